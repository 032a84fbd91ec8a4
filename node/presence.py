"""Nodes on this machine, found through small files in the user's runtime folder.

Law: a file says where a node may be; whether it is there only the node itself says (Inference.Info).
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING

import platformdirs
import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# More would mean that something leaks files; the newest are the ones that count.
_NODES_MAX = 64


def folder() -> Path:
    return platformdirs.user_runtime_path("shoal")


@contextlib.contextmanager
def announced(address: str) -> Iterator[None]:
    """While the block runs, other programs of this user find the node at `address`."""
    path = folder() / f"node-{os.getpid()}.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"pid": os.getpid(), "address": address}))
    partial.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def addresses() -> list[str]:
    """Addresses of this user's nodes whose process lives, the newest first.  Files of dead ones are removed."""
    found = []
    for path in _newest_first():
        try:
            entry = json.loads(path.read_text())
            pid, address = int(entry["pid"]), str(entry["address"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # being removed, or none of ours
        if psutil.pid_exists(pid):
            found.append(address)
        else:
            path.unlink(missing_ok=True)
    return found


def _newest_first() -> list[Path]:
    stamped = []
    for path in folder().glob("node-*.json"):
        with contextlib.suppress(OSError):
            if path.stat().st_uid == os.getuid():
                stamped.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(stamped, reverse=True)[:_NODES_MAX]]
