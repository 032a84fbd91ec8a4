"""One answer's tokens as text: detokenised as they come, ended before a stop string.

Law: the texts of all tokens together are the answer's text; what the last token completes is given with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.text import StopStrings
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from node.text import Text


class Wording:
    """Of a model without a tokenizer every text is empty.  Raises InvalidRequest for stop strings with such a model."""

    def __init__(self, text: Text, stop: tuple[str, ...]) -> None:
        if stop and not text.has_tokenizer:
            raise InvalidRequest("this model has no tokenizer, so an answer has no text to find stop strings in")
        self._text = text
        self._detokenizer = text.detokenizer() if text.has_tokenizer else None
        self._stop = StopStrings(stop)
        self.stopped = False  # a stop string was found

    def add(self, token: int, *, is_last: bool) -> str:
        """What the next token adds to the text that can be shown."""
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.push(token)
        if is_last:
            text += self._detokenizer.flush()
        shown, self.stopped = self._stop.push(text)
        return shown + self._stop.flush() if is_last and not self.stopped else shown

    def of(self, token: int) -> str:
        """A token's own text, out of context."""
        return self._text.decode([token]) if self._detokenizer is not None else ""
