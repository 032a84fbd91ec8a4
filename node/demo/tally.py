"""Who computed what during one answer: the difference of two looks at the work counters of all nodes.

Pure but for the calls to the nodes.  Law: a node that is dead keeps what it said last.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from protos import inference_pb2 as pb
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from node.client import Client

_ASK_S = 5.0
_COUNTS = ("calls", "pairs", "retried", "steps")


class Tally:
    """Counts from its construction on.  clients: of each node, by peer id."""

    def __init__(self, clients: Mapping[str, Client]) -> None:
        self._clients = clients
        self._before = self._look({})
        self._now = dict(self._before)

    def look(self) -> None:
        """Asks the nodes; one that does not answer keeps what it said last."""
        self._now = self._look(self._now)

    def work(self) -> list[pb.LayerWork]:
        """By layer and peer, of all nodes' stages together."""
        sums: dict[tuple[int, str], pb.LayerWork] = {}
        for key, entry in self._now.items():
            before = self._before.get(key, pb.LayerWork())
            total = sums.setdefault(key[1:], pb.LayerWork(layer=entry.layer, peer_id=entry.peer_id))
            for name in _COUNTS:
                setattr(total, name, getattr(total, name) + getattr(entry, name) - getattr(before, name))
        return [sums[key] for key in sorted(sums)]

    def _look(self, known: Mapping[tuple[str, int, str], pb.LayerWork]) -> dict[tuple[str, int, str], pb.LayerWork]:
        """By the node that says so, layer, and the peer that computed."""
        found = dict(known)
        for peer, client in self._clients.items():
            with contextlib.suppress(ShoalError):
                found |= {(peer, entry.layer, entry.peer_id): entry for entry in client.peers(_ASK_S).work}
        return found


def shares(work: Iterable[pb.LayerWork]) -> dict[str, float]:
    """Each peer's part of the (row, expert) pairs, the greatest first."""
    pairs: Counter[str] = Counter()
    for entry in work:
        pairs[entry.peer_id] += entry.pairs
    total = sum(pairs.values())
    return {peer: count / total for peer, count in pairs.most_common() if count}
