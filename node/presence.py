"""Nodes on this machine, found through small files in the user's runtime folder.

Law: a file says where a node may be; whether it is there only the node itself says (Inference.Info).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import psutil

from node import log

if TYPE_CHECKING:
    from collections.abc import Iterator

# More would mean that something leaks files; the newest are the ones that count.
_NODES_MAX = 64


def folder() -> Path:
    """Gone after a restart of the machine, where the system has such a place."""
    if sys.platform != "linux":
        return platformdirs.user_runtime_path("shoal")
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "shoal"
    return Path(tempfile.gettempdir()) / f"shoal-{os.getuid()}"  # what platformdirs would warn about


@contextlib.contextmanager
def announced(address: str) -> Iterator[None]:
    """While the block runs, other programs of this user find the node at `address`.

    A node that cannot write the file serves all the same: whoever asks it must then say --node.
    """
    path = folder() / f"node-{os.getpid()}.json"
    try:
        _write(path, address)
    except OSError as error:
        log.get("presence").warning("this node will not be found by itself; use --node", error=str(error))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _write(path: Path, address: str) -> None:
    _make_private(path.parent)
    addresses()  # sweeps what nodes that were killed left
    partial = path.with_suffix(".partial")
    entry = {"pid": os.getpid(), "created": psutil.Process().create_time(), "address": address}
    partial.unlink(missing_ok=True)
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:  # noqa: PTH123  (no Path has flags)
        json.dump(entry, file)
    partial.replace(path)


def _make_private(path: Path) -> None:
    """Raises PermissionError for a folder that another user made first: in a shared /tmp anybody can."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.stat()
    if status.st_uid != os.getuid():
        raise PermissionError(f"{path} belongs to another user")
    if status.st_mode & 0o077:
        path.chmod(0o700)


def addresses() -> list[str]:
    """Addresses of this user's nodes whose process lives, the newest first.  Files of dead ones are removed."""
    found = []
    for path in _newest_first():
        try:
            entry = json.loads(path.read_text())
            pid, created, address = int(entry["pid"]), float(entry["created"]), str(entry["address"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being removed, or none of ours
        if _lives(pid, created):
            found.append(address)
        else:
            path.unlink(missing_ok=True)
    return found


def _lives(pid: int, created: float) -> bool:
    """Pids are used again: a process that began at another time is another one."""
    try:
        return abs(psutil.Process(pid).create_time() - created) < 1.0
    except psutil.Error:
        return False


def _newest_first() -> list[Path]:
    stamped = []
    for path in folder().glob("node-*.json"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                stamped.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(stamped, reverse=True)[:_NODES_MAX]]
