"""Twenty real nodes on loopback: some are killed, some stand still, the killed come back.  What others say, and when.

python -m bench.gossip_nodes [--nodes 20] [--killed 3] [--stopped 2] [--stop 10] [--quiet 20]

How to read it.  Each node is a `shoal run` of its own with the LAN profile and a tiny model, of which it holds one
layer's experts; all know the address of the first one.  Times are from the nodes' own logs, since the signal or the
start.  "first" and "last": of those that say so.  "quiet": nothing happens and nobody asks; datagrams and bytes are UDP
payloads that a node sends.  CPU is of the whole process; that of a node that is alone is what is not gossip's.  All
nodes share this machine, and where it is busy they are late: "wrong" deaths are those of a node that was running.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import psutil

from bench import nodes
from bench.rounds import conditions, table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from bench.nodes import Node, Swarm

NOTICE_S = 180.0
"""Until all say that one is dead, or alive again."""

SAID = "a peer is "
EVENTS = ("", "who says so", "first", "median", "last")
QUIET = ("", "datagrams/s", "bytes/s", "bytes each", "push-pulls/min", "CPU")
COUNTED = ("datagrams sent", "bytes sent", "push-pulls")


@dataclass(frozen=True, slots=True)
class Said:
    """One node's log says what it believes of another from then on.  `at`: seconds since 1970."""

    by: str
    of: str
    state: str
    at: float


class Crowd:
    """The nodes of a swarm, and what each has said."""

    def __init__(self, swarm: Swarm) -> None:
        self.swarm = swarm
        self.nodes = list(swarm.nodes)

    def running(self) -> list[Node]:
        return [node for node in self.nodes if not node.has_ended]

    def said(self, since: float, of: Iterable[Node]) -> list[Said]:
        wanted = {node.peer for node in of}
        return [one for node in self.nodes for one in _said(node) if one.of in wanted and one.at >= since]

    def first(self, state: str, since: float, of: Node) -> dict[str, float]:
        """By whom: how long after `since` it first said so."""
        found: dict[str, float] = {}
        for one in self.said(since, [of]):
            if one.state == state:
                found.setdefault(one.by, one.at - since)
        return found

    def holds(self, state: str, of: Node, among: Sequence[Node]) -> bool:
        """Whether all of these say so now."""
        return all(self.last(node, of) == state for node in among if node is not of)

    def last(self, node: Node, of: Node) -> str:
        return next((one.state for one in reversed(_said(node)) if one.of == of.peer), "")

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + NOTICE_S
        while not condition():
            if time.monotonic() > deadline:
                print(f"NOT within {NOTICE_S:g} s: {what}")
                return
            time.sleep(0.25)  # logs are read again: it costs the nodes nothing


def main() -> None:
    arguments = _arguments()
    settings: dict[str, object] = {"probe_period_s": 0, "log_level": "debug"}
    with nodes.light_model() as subject, nodes.place() as place:
        holds = [[f"experts:{n % subject.manifest.layers}/*"] for n in range(arguments.nodes)]
        shared = {"naughty": (), "settings": settings}
        began = time.time()
        with nodes.Swarm(
            place.hatchery, place.fresh(), subject.store, holds, joins=[[0]] * len(holds), **shared
        ) as swarm:
            crowd = Crowd(swarm)
            rows = [_found(crowd, began)]
            quiet = [_quiet(f"{len(holds)} nodes", swarm, arguments.quiet)]
            killed = crowd.nodes[-arguments.killed :]
            stopped = crowd.nodes[-arguments.killed - arguments.stopped : -arguments.killed]
            rows += _kill(crowd, killed)
            rows += _stop(crowd, stopped, arguments.stop)
            rows += _restart(crowd, killed)
            rows.append(_wrong(crowd, began, [*killed, *stopped]))
        with nodes.Swarm(place.hatchery, place.fresh(), subject.store, holds[:1], **shared) as alone:
            quiet.append(_quiet("a node that is alone", alone, arguments.quiet))
    print("\n".join((table(EVENTS, rows), "", table(QUIET, quiet), "", conditions(1))))


def _found(crowd: Crowd, began: float) -> tuple[str, ...]:
    times = [max(crowd.first("alive", began, node).values()) for node in crowd.nodes]
    return _row("started together: alive to all others", times)


def _kill(crowd: Crowd, killed: Sequence[Node]) -> list[tuple[str, ...]]:
    began = time.time()
    for node in killed:
        node.send(signal.SIGKILL)
    crowd.wait(lambda: all(crowd.holds("dead", node, crowd.running()) for node in killed), "all say dead")
    return [
        _row(f"kill -9, {number} of {len(killed)}: {state}", crowd.first(state, began, node).values())
        for number, node in enumerate(killed, 1)
        for state in ("suspect", "dead")
    ]


def _stop(crowd: Crowd, stopped: Sequence[Node], stop_s: float) -> list[tuple[str, ...]]:
    others = [node for node in crowd.running() if node not in stopped]
    began = time.time()
    for node in stopped:
        node.freeze()
    time.sleep(stop_s)
    thawed = time.time()
    for node in stopped:
        node.thaw()
    crowd.wait(lambda: all(crowd.holds("alive", node, crowd.running()) for node in stopped), "the stopped are alive")
    crowd.wait(lambda: all(crowd.holds("alive", node, stopped) for node in others), "others are alive to the stopped")
    rows = []
    for number, node in enumerate(stopped, 1):
        name = f"SIGSTOP for {stop_s:g} s, {number} of {len(stopped)}"
        rows += [_row(f"{name}: {state}", crowd.first(state, began, node).values()) for state in ("suspect", "dead")]
        rows.append(_row(f"{name}: alive again, since it goes on", crowd.first("alive", thawed, node).values()))
    peers = {node.peer for node in stopped}
    wrong = [one.state for one in crowd.said(began, others) if one.by in peers]
    return [
        *rows,
        *(_count(f"said by the stopped of others: {state}", wrong.count(state)) for state in ("suspect", "dead")),
    ]


def _restart(crowd: Crowd, killed: Sequence[Node]) -> list[tuple[str, ...]]:
    began = time.time()
    crowd.swarm.restart(*killed)
    crowd.wait(lambda: all(crowd.holds("alive", node, crowd.running()) for node in killed), "the killed are back")
    rows = []
    for number, node in enumerate(killed, 1):
        times = {by: at for by, at in crowd.first("alive", began, node).items() if by != node.peer}
        rows.append(_row(f"started again, {number} of {len(killed)}: alive, since its start", times.values()))
    return rows


def _wrong(crowd: Crowd, began: float, touched: Sequence[Node]) -> tuple[str, ...]:
    untouched = [node for node in crowd.nodes if node not in touched]
    dead = [one for one in crowd.said(began, untouched) if one.state == "dead"]
    return _count("wrong: dead, said of those that always ran", len(dead))


def _quiet(name: str, swarm: Swarm, quiet_s: float) -> tuple[str, ...]:
    before, cpu, began = _counts(swarm), _cpu(swarm), time.monotonic()
    time.sleep(quiet_s)
    spent_s = time.monotonic() - began
    cpu = [(now - then) / spent_s for now, then in zip(_cpu(swarm), cpu, strict=True)]
    counts = [
        statistics.fmean(now[n] - then[n] for now, then in zip(_counts(swarm), before, strict=True)) for n in range(3)
    ]
    datagrams, bytes_sent, syncs = (count / spent_s for count in counts)
    each = f"{bytes_sent / datagrams:.0f}" if datagrams else ""
    share = f"{100 * statistics.median(cpu):.2f} % ({100 * min(cpu):.2f} to {100 * max(cpu):.2f})"
    return (f"{name}, {quiet_s:g} s", f"{datagrams:.1f}", f"{bytes_sent:,.0f}", each, f"{60 * syncs:.1f}", share)


def _counts(swarm: Swarm) -> list[tuple[int, ...]]:
    replies = [swarm.peers(node.number).counts for node in swarm.nodes]
    return [tuple(counts[name] for name in COUNTED) for counts in replies]


def _cpu(swarm: Swarm) -> list[float]:
    """Seconds, by node."""
    times = [psutil.Process(node.pid).cpu_times() for node in swarm.nodes]
    return [spent.user + spent.system for spent in times]


def _said(node: Node) -> list[Said]:
    found = []
    for line in node.errors.splitlines():
        if f'"{SAID}' in line:
            said = json.loads(line)
            at = datetime.fromisoformat(said["timestamp"]).timestamp()
            found.append(Said(node.peer, said["peer"], said["event"].removeprefix(SAID), at))
    return found


def _row(name: str, times: Iterable[float]) -> tuple[str, ...]:
    """`times`: one for each who says so."""
    found = sorted(times)
    if not found:
        return _count(name, 0)
    return (name, str(len(found)), *(f"{t:.1f} s" for t in (found[0], statistics.median(found), found[-1])))


def _count(name: str, count: int) -> tuple[str, ...]:
    return (name, str(count), "", "", "")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--killed", type=int, default=3)
    parser.add_argument("--stopped", type=int, default=2)
    parser.add_argument("--stop", type=float, default=10.0)
    parser.add_argument("--quiet", type=float, default=20.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
