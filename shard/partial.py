"""Files that are being written: each in the store's folder `partial`, locked by its writer until it has its name.

Law: only what nobody writes any more is removed.  A lock says that (flock: the kernel lets go of it when the writer
ends, however it ends); a process id does not, since containers that share a store each count their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in `folder` and its path.  Rename it inside the block to keep it; otherwise it is gone afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        path, file = _new(folder)
        stack.enter_context(file)
        stack.callback(path.unlink, missing_ok=True)
        yield path, file


def _new(folder: Path) -> tuple[Path, BinaryIO]:
    while True:
        path = folder / secrets.token_hex(16)
        file = path.open("xb")
        # Without locks (some network file systems have none) nobody can sweep either, so the file is as safe.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # it was swept between its making and its lock


def sweep(folder: Path) -> None:
    """Removes what writers that are gone had begun."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
            if _abandoned(file):
                path.unlink()


def _abandoned(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
