"""The files of a node's revocation list: the operator's, where the node has it, and its own copy of the one in force.

Law: the operator's file is read and never written; the copy is written whole or not at all.  What is in them is judged
elsewhere: whoever can change a file cannot sign a list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node import operator_files
from protos.errors import InvalidRequest
from protos.limits import REVOCATIONS_BYTES_MAX

if TYPE_CHECKING:
    import os
    from pathlib import Path


class RevocationsFile:
    """One file that others may replace at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._data = b""

    def news(self) -> bytes | None:
        """What is in it, if it is another file than the last time; None: no, or there is none.

        Raises InvalidRequest for one that cannot be read; it is not news again until it changes.
        """
        try:
            stamp = _stamp(self.path.stat())
        except FileNotFoundError:
            self._seen = None
            return None
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if stamp == self._seen:
            return None
        self._seen = stamp
        try:
            self._data = operator_files.read(self.path, REVOCATIONS_BYTES_MAX)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return self._data

    def keep(self, data: bytes) -> None:
        """Unless that is in it already.  Raises OSError."""
        if data == self._data:
            return
        self._data = data
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        operator_files.write(self.path, data)
        self._seen = _stamp(self.path.stat())


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    """Whoever replaces the file, as operator_files.write does, makes another inode of it."""
    return status.st_mtime_ns, status.st_size, status.st_ino


def _unreadable(path: Path, error: OSError) -> InvalidRequest:
    return InvalidRequest(f"the revocation list {path} cannot be read: {error.strerror}")
