"""Text that comes in pieces, as an indented paragraph on stdout.

Law: what was written is never taken back; a word is written when it is whole.
"""

from __future__ import annotations

import re
import shutil
import sys
from typing import Final

WIDTH_MAX: Final = 100
_INDENT = "  "
_PIECES = re.compile(r"\n|[^\S\n]+|\S+")


class Paragraph:
    """Lines of at most `width` characters; a word that is longer stands alone."""

    def __init__(self, width: int | None = None) -> None:
        self._width = width or min(shutil.get_terminal_size((80, 24)).columns, WIDTH_MAX)
        self._column = 0
        self._word = ""
        self._gap = ""

    def add(self, text: str) -> None:
        """Writes the words that are complete now."""
        pieces = _PIECES.findall(self._word + text)
        self._word = pieces.pop() if pieces and not pieces[-1].isspace() else ""
        for piece in pieces:
            self._place(piece)
        sys.stdout.flush()

    def end_line(self) -> None:
        """Writes what there is, and goes to a new line unless at the beginning of one."""
        if self._word:
            self._place(self._word)
        self._word = self._gap = ""
        if self._column:
            self._new_line()
        sys.stdout.flush()

    def _place(self, piece: str) -> None:
        if piece == "\n":
            self._new_line()
        elif piece.isspace():
            self._gap = " "
        else:
            if self._column and self._column + len(self._gap) + len(piece) > self._width:
                self._new_line()
            before = self._gap if self._column else _INDENT
            sys.stdout.write(before + piece)
            self._column += len(before) + len(piece)
            self._gap = ""

    def _new_line(self) -> None:
        sys.stdout.write("\n")
        self._column = 0
        self._gap = ""
