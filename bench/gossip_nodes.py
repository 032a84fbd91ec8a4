"""Twenty real nodes on loopback: some are killed, some stand still, the killed come back.  What the others say, and when.

python -m bench.gossip_nodes [--nodes 20] [--killed 3] [--stopped 2] [--stop 10] [--quiet 20]

How to read it.  Each node is a `shoal run` of its own with the LAN profile, a tiny model of which it holds one layer's
experts, and the address of the first node.  Times are from the nodes' own logs, since the moment of the deed.  "quiet":
nothing happens and nobody asks; datagrams and bytes are UDP payloads sent by a node, and CPU is the process's, of which
most is not gossip's: an idle node that knows nobody is there for comparison.  All nodes share the machine, so where it
is busy a node may be late, and its peers must bear with it: "wrong deaths" are those of a node that was running.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from bench import models, nodes
from bench.rounds import conditions, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bench.nodes import Node, Place, Swarm

NOTICE_S = 180.0  # until all say that one is dead, or alive again
PREFIX = "a peer is "


@dataclass(frozen=True, slots=True)
class Said:
    """That a node believes something new of another.  `at`: seconds since 1970."""

    by: int
    of: int
    state: str
    at: float


@dataclass
class Figures:
    """Rows of the tables."""

    events: list[tuple[str, ...]] = field(default_factory=list)
    quiet: list[tuple[str, ...]] = field(default_factory=list)


def main() -> None:
    arguments = _arguments()
    settings = {"probe_period_s": 0, "log_level": "debug"}
    figures = Figures()
    count = arguments.nodes
    with models.quiet(), nodes.light_model() as subject, nodes.place() as place:
        began = time.time()
        holds = [[f"experts:{n % subject.manifest.layers}/*"] for n in range(count)]
        with nodes.Swarm(
            place.hatchery, place.fresh(), subject.store, holds, naughty=(), joins=[[0]] * count, settings=settings
        ) as swarm:
            found = statistics.fmean(_first_seen(swarm))
            figures.events.append(("all find each other", f"{count}", "", "", f"{time.time() - began:.1f} s", ""))
            figures.quiet = [_quiet(swarm, arguments.quiet), _lonely(place, subject.store, arguments.quiet)]
            _kill(swarm, arguments.killed, figures)
            _stop(swarm, arguments.killed, arguments.stopped, arguments.stop, figures)
            _restart(swarm, arguments.killed, figures)
    del found
    print(conditions(1))


if __name__ == "__main__":
    main()
