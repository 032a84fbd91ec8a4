"""`shoal chat`: a conversation on the terminal, or with the lines of a pipe.

Law: the history is what was shown: a question whose answer failed leaves it, an answer that was stopped stays as far
as it came.  stdout carries the answers and nothing else.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Final

from node import answer
from protos.errors import ContextTooLong, InvalidRequest, ShoalError, Unavailable
from protos.limits import CHAT_MESSAGES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.doors import Doors
    from protos import inference_pb2 as pb

PROMPT: Final = "> "
HELP: Final = "/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


class Chat:
    """`request` has the sampling, and the system message if there is one; `tell` writes lines to stderr."""

    def __init__(
        self, doors: Doors, request: pb.GenerateRequest, tell: Callable[[str], None], *, stats: bool = False
    ) -> None:
        self._doors = doors
        self._request = request
        self._beginning = list(request.chat.messages)
        self._tell = tell
        self._stats = stats

    def begin(self) -> pb.InfoReply:
        """Finds a door.  Raises InvalidRequest where the model knows no chats."""
        info = self._doors.reach()
        if not info.has_chat_template:
            raise InvalidRequest(
                f"model {info.model_id[:12]} has no chat template, so it knows no chats; "
                "use: shoal generate --raw, or with --token-ids if it has no tokenizer either"
            )
        self._request.model = info.model_id
        return info

    def talk(self, *, interactive: bool) -> None:
        """Until the input ends.  Raises what an answer fails with, unless somebody is there to go on."""
        while (line := _read(interactive, self._tell)) is not None:
            text = line.strip()
            if not text:
                continue
            if _is_command(text):
                if text == "/quit":
                    return
                self._command(text)
                continue
            try:
                self.ask(text)
            except ShoalError as error:
                if not interactive:
                    raise
                self._tell(f"error: {error.message}{_advice(error)}")
            except KeyboardInterrupt:
                if not interactive:
                    raise

    def ask(self, text: str) -> None:
        """One turn.  Raises what the answer fails with, or KeyboardInterrupt; then the history is as it should be."""
        messages = self._request.chat.messages
        if len(messages) + 2 > CHAT_MESSAGES_MAX:
            raise ContextTooLong(f"a chat has at most {CHAT_MESSAGES_MAX} messages")
        messages.add(role="user", content=_valid(text))
        shown = answer.Shown()
        try:
            with contextlib.closing(self._doors.generate(self._request)) as events:
                answer.stream(events, self._tell, as_ids=False, shown=shown)
        except ShoalError:
            messages.pop()
            raise
        except KeyboardInterrupt:
            self._remember(shown)
            raise
        self._remember(shown)
        if self._stats:
            self._tell(answer.summary(shown))
        elif line := answer.cut_off(shown):
            self._tell(line)

    def reset(self) -> None:
        """Begins anew, with the system message."""
        del self._request.chat.messages[:]
        self._request.chat.messages.extend(self._beginning)

    def _remember(self, shown: answer.Shown) -> None:
        if shown.text:
            self._request.chat.messages.add(role="assistant", content=shown.text)
        else:  # templates want turns that take turns
            self._request.chat.messages.pop()

    def _command(self, text: str) -> None:
        if text == "/reset":
            self.reset()
            self._tell("(forgotten)")
        else:
            self._tell(HELP if text == "/help" else f"no command {text}: {HELP}")


def _is_command(text: str) -> bool:
    """A slash and one word; a path is something to talk about."""
    return text.startswith("/") and text[1:].isalpha()


def _advice(error: ShoalError) -> str:
    if isinstance(error, ContextTooLong):
        return " (/reset begins anew)"
    return " (ask again)" if isinstance(error, Unavailable) else ""


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the line is not valid UTF-8; give it as UTF-8 text") from None
    return text


def _read(interactive: bool, tell: Callable[[str], None]) -> str | None:
    """A line; None at the end.  Ctrl-C discards what was typed."""
    if not interactive:
        return sys.stdin.readline() or None
    while True:
        try:
            return input(PROMPT)
        except EOFError:
            tell("")
            return None
        except KeyboardInterrupt:
            tell("")
            tell(f"({HELP})")
