"""How fast a death is found, how often a life is taken for one, and what gossip costs, on a virtual network.

python -m bench.gossip [--nodes 10 100 1000] [--most 5000] [--loss 0 5 25] [--slow 0 20] [--seed 1] [--jobs 1]

How to read it.  Nodes start converged and run for a while; then nodes that are not slow crash one after the other.
"first" is from a crash to the first node that concludes it, "all" to the last of those that are not slow themselves.
A false death is one node's conclusion that a live node is dead: about nodes that are not slow, per node and hour,
counted at every node ("at any") and at those that are not slow ("at well"); "of slow" are conclusions about slow
nodes.  A slow node is Lifeguard's: its timers run, and its messages wait, in and out, while it is blocked.  Bytes are
UDP payload and headers that a node sends in a second, first before anybody crashed ("quiet"), then over the whole run;
push-pull is not counted.  All is virtual time, so the machine's speed changes nothing but the wait.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.converged import Converged
from node.profile import LAN, MEMBERLIST_LAN, PLAIN_SWIM
from tests.sim.links import Quality

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from node.profile import Profile

WAYS: dict[str, Profile] = {"ours": LAN, "plain SWIM": PLAIN_SWIM, "memberlist": MEMBERLIST_LAN}
HEAD = ("nodes", "loss", "slow", "", "first p50", "p99", "all p50", "p99", "false/h at any", "at well", "of slow",
        "quiet packets/s", "bytes/s", "packets/s", "bytes/s")  # fmt: skip
WARM_S = 5.0
CRASH_EVERY_S = 1.0
# A crash that nobody has concluded by then counts as this long.
WAIT_S_MAX = 120.0
# Of the nodes at most so many die in one run: more, and a run's end has other sizes than its beginning.
CRASHED_PART_MAX = 10
# From so many nodes on a run costs minutes, and one is enough: false deaths are many there.
MANY = 1000
CRASHES_OF_MANY = 5


@dataclass(frozen=True, slots=True)
class Cell:
    nodes: int
    loss: int
    slow: int
    way: str


@dataclass(slots=True)
class Figures:
    first_s: list[float]
    all_s: list[float]
    node_hours: float = 0.0
    false_any: int = 0
    false_well: int = 0
    false_slow: int = 0
    datagrams: int = 0
    sent_bytes: int = 0
    quiet_seconds: float = 0.0
    quiet_datagrams: int = 0
    quiet_bytes: int = 0
    cpu_s: float = 0.0


def main() -> int:
    arguments = _arguments()
    began = time.monotonic()
    cells = list(_cells(arguments))
    rows = []
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        measured = pool.imap(functools.partial(measure, arguments=arguments), cells)
        for cell, figures in zip(cells, measured, strict=True):
            rows.append(row(cell, figures))
            print(f"{cell}: {figures.cpu_s:.0f} s", file=sys.stderr, flush=True)
    print(table(HEAD, rows))
    print(
        f"\nTimes in seconds. {arguments.crashes} crashes a row ({CRASHES_OF_MANY} from {MANY:,} nodes on), seed"
        f" {arguments.seed}. Slow nodes are blocked for {arguments.blocked_s} s and open for {arguments.open_s} s on"
        f" average; one way takes 0.5 ms. Measured in {time.monotonic() - began:.0f} s."
    )
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--most", type=int, default=5000, help="without loss and slow nodes; 0: none")
    parser.add_argument("--loss", type=int, nargs="+", default=[0, 5, 25], help="per cent")
    parser.add_argument("--slow", type=int, nargs="+", default=[0, 20], help="per cent")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    parser.add_argument("--crashes", type=int, default=20)
    parser.add_argument("--watch-s", type=float, default=120.0, help="least length of a run below 1,000 nodes")
    parser.add_argument("--blocked-s", type=float, default=4.0)
    parser.add_argument("--open-s", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    return parser.parse_args()


def _cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    for nodes in arguments.nodes:
        for loss in arguments.loss:
            for slow in arguments.slow:
                yield from (Cell(nodes, loss, slow, way) for way in arguments.ways)
    if arguments.most:
        yield from (Cell(arguments.most, 0, 0, way) for way in arguments.ways)


def measure(cell: Cell, arguments: argparse.Namespace) -> Figures:
    """Runs until there were enough crashes."""
    began = time.process_time()
    figures = Figures([], [])
    crashes = CRASHES_OF_MANY if cell.nodes >= MANY else arguments.crashes
    a_run = max(1, min(crashes, cell.nodes // CRASHED_PART_MAX))
    for number in range(-(-crashes // a_run)):
        _run(cell, arguments, arguments.seed * 1000 + number, a_run, figures)
    figures.cpu_s = time.process_time() - began
    return figures


def _run(cell: Cell, arguments: argparse.Namespace, seed: int, crashes: int, figures: Figures) -> None:
    slow = cell.nodes * cell.slow // 100
    swarm = Converged(
        cell.nodes,
        Quality(latency_s=0.0004, jitter_s=0.0001, loss=cell.loss / 100),
        WAYS[cell.way],
        seed,
        slow=slow,
        blocked_s=arguments.blocked_s,
        open_s=arguments.open_s,
    )
    swarm.meter.counts = True
    swarm.run_for(WARM_S)
    figures.quiet_seconds += cell.nodes * WARM_S
    figures.quiet_datagrams += swarm.meter.datagrams
    figures.quiet_bytes += swarm.meter.sent_bytes
    began_s = swarm.network.now
    victims = swarm.luck.sample(range(slow, cell.nodes), crashes)
    dead = []
    for victim in victims:
        dead.append(swarm.crash(victim))
        swarm.run_for(CRASH_EVERY_S)
    _wait(swarm, dead)
    if cell.nodes < MANY:
        swarm.run_for(max(0.0, began_s + arguments.watch_s - swarm.network.now))
    _count(swarm, dead, swarm.network.now - began_s + WARM_S, cell.nodes, figures)


def _wait(swarm: Converged, dead: list[bytes]) -> None:
    observers = set(swarm.well)
    end_s = swarm.network.now + WAIT_S_MAX
    while swarm.network.now < end_s and any(observers - swarm.meter.concluded_s[peer].keys() for peer in dead):
        swarm.run_for(1.0)


def _count(swarm: Converged, dead: list[bytes], span_s: float, nodes: int, figures: Figures) -> None:
    meter = swarm.meter
    for peer in dead:
        died_s = meter.died_s[peer]
        concluded_s = [meter.concluded_s[peer].get(number, died_s + WAIT_S_MAX) for number in swarm.well]
        figures.first_s.append(min(concluded_s) - died_s)
        figures.all_s.append(max(concluded_s) - died_s)
    figures.node_hours += nodes * span_s / 3600
    figures.false_any += meter.false_about_well
    figures.false_well += meter.false_among_well
    figures.false_slow += meter.false_about_slow
    figures.datagrams += meter.datagrams
    figures.sent_bytes += meter.sent_bytes


def row(cell: Cell, figures: Figures) -> list[str]:
    node_seconds = figures.node_hours * 3600
    return [
        f"{cell.nodes:,}",
        f"{cell.loss} %",
        f"{cell.slow} %",
        cell.way,
        *(f"{part(values, share):.1f}" for values in (figures.first_s, figures.all_s) for share in (0.5, 0.99)),
        *(f"{count / figures.node_hours:.3g}" for count in (figures.false_any, figures.false_well, figures.false_slow)),
        f"{figures.quiet_datagrams / figures.quiet_seconds:.1f}",
        f"{figures.quiet_bytes / figures.quiet_seconds:,.0f}",
        f"{figures.datagrams / node_seconds:.1f}",
        f"{figures.sent_bytes / node_seconds:,.0f}",
    ]


def part(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, all on the right.  (bench.rounds has the like, and imports torch.)"""
    rule = ["---:"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


if __name__ == "__main__":
    sys.exit(main())
