"""Swarms of real nodes for measurements: what the end-to-end tests start them with.

Law: a node that is measured runs as a user's would: a process of its own, one torch thread, TLS unless it is said.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).parents[1] / "tests" / "e2e"))

import deeds
import swarm

if TYPE_CHECKING:
    from collections.abc import Iterator

Answer = swarm.Answer
Deed = deeds.Deed
Hatchery = swarm.Hatchery
Node = swarm.Node
Swarm = swarm.Swarm
ask = swarm.ask
free_ports = swarm.free_ports
spans = swarm.spans
spread = swarm.spread


@dataclass(frozen=True, slots=True)
class Place:
    """Where swarms are started, and with what."""

    hatchery: Hatchery
    folder: Path

    def fresh(self) -> Path:
        """A folder for one swarm."""
        return Path(tempfile.mkdtemp(dir=self.folder))


@contextlib.contextmanager
def place() -> Iterator[Place]:
    """The client that asks has its key there too, not among the user's."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {f"XDG_{name}_HOME": str(Path(folder) / name.lower()) for name in ("DATA", "CONFIG")}
        with Hatchery() as hatchery:
            yield Place(hatchery, Path(folder))


def decode_speed(answer: Answer) -> float:
    """Tokens a second after the first one."""
    return (len(answer.times) - 1) / (answer.times[-1] - answer.times[0])


def remote_share(running: Swarm, door: int = 0) -> float:
    """Of the (row, expert) pairs of the door's stage, those that other nodes computed."""
    work = running.work(door)
    pairs = {peer: total.pairs for peer, total in work.items()}
    return 1 - pairs.get(running[door].peer, 0) / max(1, sum(pairs.values()))
