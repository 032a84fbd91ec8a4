"""Folders in which checkpoints are made: gone afterwards, whatever happens.

Law: a full disk is StoreFull, never half a checkpoint under its final name.
"""

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from protos.errors import StoreFull

SCRATCH_PREFIX = ".demo-model-"
SCRATCH_S_MAX = 24 * 3600.0  # a scratch folder this old belongs to a build that was killed


@contextmanager
def scratch(parent: Path, needed: int = 0) -> Iterator[Path]:
    """A folder inside `parent` that is gone afterwards, whatever happens."""
    parent.mkdir(parents=True, exist_ok=True)
    _sweep(parent)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise _full(parent, f"{needed // 1_000_000} MB are needed, {free // 1_000_000} MB are free")
    try:
        with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=parent) as folder:
            yield Path(folder)
    except (OSError, SafetensorError) as failure:
        if getattr(failure, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(failure):
            raise _full(parent, "it filled up on the way") from failure
        raise


def _full(folder: Path, reason: str) -> StoreFull:
    return StoreFull(f"no room to build the demo model in {folder}: {reason}. Free some space or name another folder")


def _sweep(parent: Path) -> None:
    """Removes what killed builds left."""
    for folder in parent.glob(f"{SCRATCH_PREFIX}*"):
        with suppress(FileNotFoundError):  # another build sweeps too
            if time.time() - folder.stat().st_mtime > SCRATCH_S_MAX:
                shutil.rmtree(folder)
