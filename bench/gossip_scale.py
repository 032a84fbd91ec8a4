"""Ten thousand virtual nodes that know each other: a crash, a join, and a partition of a tenth that heals.

python -m bench.gossip_scale [--nodes 10000] [--split-s 5] [--seed 1]

How to read it.  All nodes run in one process; tables share one census, and each holds only where it differs.  "first"
and "all" are virtual seconds: of the crash, until the first and the last live node conclude it; of the join, until the
first and the last know the newcomer, which itself knows one seed; of the partition, from its end until nobody doubts
anybody who lives.  Wall time is this machine's, and memory the process's peak so far.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.converged import Converged
from bench.gossip import table
from node.census import EMPTY
from node.member import State
from node.membership_effect import Changed
from node.profile import LAN
from tests.sim.links import Cut, Quality
from tests.sim.network import Watcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.sim.machine import Machine

HEAD = ("what", "first", "all", "virtual time run", "wall time", "peak memory")
WARM_S = 5.0
WAIT_S_MAX = 300.0


@dataclass(slots=True)
class Beliefs(Watcher):
    """How many beliefs about live peers are not ALIVE, and who has learnt what since `mark`."""

    gone: set[bytes] = field(default_factory=set)
    doubted: int = 0
    watched: bytes = b""
    wanted: State = State.DEAD
    reached_s: list[float] = field(default_factory=list)

    def watch(self, peer: bytes, wanted: State) -> None:
        self.watched, self.wanted, self.reached_s = peer, wanted, []

    def stepped(self, machine: Machine, kind: str, content: Any, effects: list[Any]) -> None:
        for effect in effects:
            if type(effect) is not Changed or effect.before is effect.after:
                continue
            if effect.peer not in self.gone:
                self.doubted += (effect.after is not State.ALIVE) - (effect.before not in (None, State.ALIVE))
            if effect.peer == self.watched and effect.after is self.wanted:
                self.reached_s.append(machine.now)


class Scale:
    def __init__(self, nodes: int, seed: int) -> None:
        self.nodes = nodes
        self.swarm = Converged(nodes, Quality(latency_s=0.0004, jitter_s=0.0001), LAN, seed)
        self.beliefs = Beliefs()
        self.swarm.network.watchers += (self.beliefs,)
        self.rows: list[list[str]] = []

    def measure(self, what: str, act: Callable[[], tuple[str, str]]) -> None:
        wall, virtual = time.monotonic(), self.swarm.network.now
        first, last = act()
        spent = f"{time.monotonic() - wall:.0f} s"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.rows.append([what, first, last, f"{self.swarm.network.now - virtual:.0f} s", spent, f"{peak:,.0f} MiB"])
        print(" | ".join(self.rows[-1]), file=sys.stderr, flush=True)

    def warm(self) -> tuple[str, str]:
        self.swarm.run_for(WARM_S)
        return "-", "-"

    def crash(self) -> tuple[str, str]:
        victim = self.swarm.network.machines[self.nodes // 2].host
        assert victim is not None
        self.beliefs.gone.add(victim.peer)
        self.beliefs.watch(victim.peer, State.DEAD)
        self.swarm.crash(self.nodes // 2)
        return self._reached(self.nodes - 1)

    def join(self) -> tuple[str, str]:
        pen = self.swarm.notary.pen("newcomer")
        self.beliefs.watch(pen.peer, State.ALIVE)
        self.swarm.add(pen, EMPTY, seeds=(0,))
        return self._reached(self.nodes - 1)

    def split(self, for_s: float) -> tuple[str, str]:
        tenth = frozenset(range(self.nodes // 10))
        rest = frozenset(range(len(self.swarm.network.machines))) - tenth
        cuts = self.swarm.network.links.cuts
        cuts += [Cut(tenth, rest), Cut(rest, tenth)]
        self.swarm.run_for(for_s)
        cuts.clear()
        healed_s = self.swarm.network.now
        print(f"{self.beliefs.doubted:,} doubts when it heals", file=sys.stderr, flush=True)
        while self.beliefs.doubted and self.swarm.network.now < healed_s + WAIT_S_MAX:
            self.swarm.run_for(1.0)
        return (
            "-",
            f"{self.swarm.network.now - healed_s:.0f} s" if not self.beliefs.doubted else f"> {WAIT_S_MAX:.0f} s",
        )

    def _reached(self, observers: int) -> tuple[str, str]:
        """Of `observers` nodes; a death that is concluded twice does not happen here."""
        began_s = self.swarm.network.now
        reached = self.beliefs.reached_s
        while len(reached) < observers and self.swarm.network.now < began_s + WAIT_S_MAX:
            self.swarm.run_for(1.0)
        first = f"{min(reached) - began_s:.1f} s" if reached else "-"
        return first, f"{max(reached) - began_s:.1f} s" if len(reached) >= observers else f"{len(reached)} nodes only"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--split-s", type=float, default=5.0, help="0: no partition")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    began = time.monotonic()
    scale = Scale(arguments.nodes, arguments.seed)
    scale.measure(f"{arguments.nodes:,} nodes, quiet", scale.warm)
    scale.measure("a crash", scale.crash)
    scale.measure("a join", scale.join)
    if arguments.split_s:
        scale.measure(f"a tenth apart for {arguments.split_s:.0f} s", lambda: scale.split(arguments.split_s))
    print(table(HEAD, scale.rows))
    print(f"\nSeed {arguments.seed}, LAN profile. Measured in {time.monotonic() - began:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
