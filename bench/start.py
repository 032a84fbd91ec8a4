"""Seconds from starting the command to the first token of the demo model, and a node's memory with and without weights.

python -m bench.start [--rounds 3]

How to read it.  `shoal generate` is timed from the start of its process to the first byte on its stdout: once with
`--store`, so that it starts a node for the answer, and once with a node that runs already.  Memory is the PSS of a
`shoal run` process that has given one answer (each page counted once, shared ones by their share): serving a random
checkpoint of 1 MB, which is a node without weights, and serving the demo model, whose weights are mapped from files.
Files are in the page cache, as after a first start.  The demo model must have been built (`shoal demo-model`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from bench import models
from bench.rounds import conditions, interleaved, median, table
from node.demo.random_model import build_random
from shard.pack import pack
from shard.weights import UnitStore

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
START_S_AIM = 8.0
PSS_BYTES_AIM = 400 * MIB
WAIT_S = 120.0
PROMPT = "What is the capital of France?"
SHOAL = (sys.executable, "-m", "node.cli")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder with a store, in which no command finds nodes or settings of elsewhere."""

    folder: Path
    store: Path

    @property
    def environment(self) -> dict[str, str]:
        folders = {f"XDG_{name}_HOME": str(self.folder / name.lower()) for name in ("CONFIG", "DATA")}
        code = str(Path(__file__).parents[1])
        return os.environ | folders | {"XDG_RUNTIME_DIR": str(self.folder / "runtime"), "PYTHONPATH": code}


def main() -> int:
    arguments = _arguments()
    with models.demo() as subject, tempfile.TemporaryDirectory() as folder:
        if subject is None:
            print("the demo model is not in the cache: build it with `shoal demo-model`")
            return 1
        demo = _place(Path(folder) / "demo", subject.store)
        empty = _place(Path(folder) / "empty", Path(folder) / "store")
        pack(build_random(Path(folder) / "checkpoint"), UnitStore(empty.store))
        bare = _memory(empty, "--token-ids", "5,17,29")
        with _running(demo) as pid:
            times = interleaved({"cold": lambda: _first_byte_s(demo, "--store", str(demo.store))}, arguments.rounds)
            times |= interleaved({"warm": lambda: _first_byte_s(demo)}, arguments.rounds)
            loaded = _pss(pid)
    cold, warm = median(times["cold"]), median(times["warm"])
    rows = [
        ["first token, no node running", f"{cold:.1f} s", f"below {START_S_AIM:.0f} s"],
        ["first token, node running", f"{warm:.2f} s", ""],
        ["PSS of a node without weights", f"{bare / MIB:.0f} MiB", f"below {PSS_BYTES_AIM / MIB:.0f} MiB"],
        ["PSS of a node with the demo model", f"{loaded / MIB:.0f} MiB", ""],
    ]
    print(table(("", "measured", "aim"), rows))
    print(f"\nMedians of {arguments.rounds}. {conditions()}.")
    passed = cold < START_S_AIM and bare < PSS_BYTES_AIM
    print("passed" if passed else "FAILED")
    return 0 if passed else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def _place(folder: Path, store: Path) -> Place:
    (folder / "runtime").mkdir(parents=True, mode=0o700)
    return Place(folder, store)


@contextlib.contextmanager
def _running(place: Place) -> Iterator[int]:
    """A node that other commands in this place find; its pid."""
    with subprocess.Popen(
        [*SHOAL, "run", "--store", str(place.store), "--port", "0", "--log-level", "warning"],
        stdout=subprocess.PIPE,
        env=place.environment,
    ) as node:
        assert node.stdout is not None
        try:
            if not node.stdout.readline().startswith(b"serving"):
                raise RuntimeError("the node did not start")
            yield node.pid
        finally:
            node.terminate()


def _memory(place: Place, *prompt: str) -> int:
    with _running(place) as pid:
        _first_byte_s(place, prompt=prompt)
        return _pss(pid)


def _pss(pid: int) -> int:
    """Elsewhere than on Linux: what no other process shares."""
    memory = psutil.Process(pid).memory_full_info()
    return int(getattr(memory, "pss", memory.uss))


def _first_byte_s(place: Place, *flags: str, prompt: tuple[str, ...] = (PROMPT,)) -> float:
    started = time.perf_counter()
    with subprocess.Popen(
        [*SHOAL, "generate", "--max-tokens", "8", *flags, *prompt],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=place.environment,
    ) as command:
        assert command.stdout is not None
        first = command.stdout.read(1)
        seconds = time.perf_counter() - started
        command.stdout.read()
        if not first or command.wait(WAIT_S):
            raise RuntimeError("the command gave no answer")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
