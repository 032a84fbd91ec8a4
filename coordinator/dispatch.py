"""Dispatch: which replica computes which expert of one layer of one step.

Pure: equal views and calls give equal assignments.  Law: every expert asked for is assigned once, to a peer that says
that it holds it and that the caller does not avoid, or is listed as unheld.

Holders of an expert stand in ranks: this node itself; alive peers before suspect ones, near before far; dead ones last,
since an answer that would otherwise end may well try them.  Within a rank the work is spread evenly over as few calls
as that takes, and a hash keyed by this node orders equals, so that nodes with the same view do not herd onto one peer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from coordinator.view import Health

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from coordinator.view import View
    from protos.ids import PeerId

    Ranks = tuple[tuple[PeerId, ...], ...]  # the best rank first, none empty

_AVOID_NONE: Final[Mapping[int, AbstractSet[PeerId]]] = MappingProxyType({})

# Peers are equally near within a factor of four: a replica on this LAN goes before one across the country, but the
# jitter of a busy machine does not move work about.
_RTT_STEPS_S = (0.01, 0.04, 0.16)


@dataclass(slots=True)
class Assignment:
    """One layer's work: the experts that each peer computes, and those that nobody is left to ask for."""

    calls: dict[PeerId, list[int]] = field(default_factory=dict)
    unheld: list[int] = field(default_factory=list)


class Dispatch:
    """The ranks of each expert's holders.  One thread calls it: the one that computes the layers."""

    def __init__(self, me: PeerId, experts: Sequence[int]) -> None:
        """`experts` is the number of routed experts of each layer, 0 where it is dense."""
        self._me = me
        self._experts = tuple(experts)
        self._holders: list[list[tuple[int, PeerId, int]]] = [[] for _ in experts]  # by layer: (rank, peer, mask)
        self._ranks: list[list[Ranks | None]] = [[None] * count for count in experts]

    def update(self, view: View) -> None:
        """Takes a new view.  What stays as it was is not ranked again, and the rest when it is first asked for."""
        standing = sorted((self._standing(view, peer), peer) for peer in view.records)
        for layer, count in enumerate(self._experts):
            holders = [
                (rank, peer, mask) for rank, peer in standing if (mask := view.records[peer].experts.get(layer, 0))
            ]
            if holders != self._holders[layer]:
                self._holders[layer] = holders
                self._ranks[layer] = [None] * count

    def assign(
        self, layer: int, experts: Collection[int], avoid: Mapping[int, AbstractSet[PeerId]] = _AVOID_NONE
    ) -> Assignment:
        """Who computes `experts` (each named once).  `avoid` has the peers that an expert shall not go to (again)."""
        known = self._ranks[layer]
        assignment = Assignment()
        calls = assignment.calls
        choices: list[tuple[int, tuple[PeerId, ...]]] = []
        for expert in experts:
            ranks = known[expert]
            if ranks is None:
                ranks = known[expert] = self._rank(layer, expert)
            peers = _best(ranks, avoid[expert]) if expert in avoid else ranks[0] if ranks else ()
            if len(peers) > 1:
                choices.append((expert, peers))
            elif peers:
                calls.setdefault(peers[0], []).append(expert)
            else:
                assignment.unheld.append(expert)
        if choices:
            _spread(calls, choices)
        return assignment

    def _standing(self, view: View, peer: PeerId) -> int:
        """The rank of a peer for all that it holds: 0 is this node."""
        if peer == self._me:
            return 0
        distance = sum(view.rtt_of(peer) > step for step in _RTT_STEPS_S)
        health = view.health_of(peer)
        # A dead peer's distance is from when it lived.
        return 1 + health * (len(_RTT_STEPS_S) + 1) + (0 if health is Health.DEAD else distance)

    def _rank(self, layer: int, expert: int) -> Ranks:
        ranks: dict[int, list[PeerId]] = {}
        for rank, peer, mask in self._holders[layer]:  # by ascending rank
            if mask >> expert & 1:
                ranks.setdefault(rank, []).append(peer)
        return tuple(tuple(sorted(peers, key=lambda peer: self._key(layer, expert, peer))) for peers in ranks.values())

    def _key(self, layer: int, expert: int, peer: PeerId) -> bytes:
        return hashlib.blake2b(f"{self._me}/{layer}/{expert}/{peer}".encode(), digest_size=8).digest()


def _best(ranks: Ranks, avoid: AbstractSet[PeerId]) -> tuple[PeerId, ...]:
    """The best rank in which anybody is left."""
    for rank in ranks:
        left = tuple(peer for peer in rank if peer not in avoid)
        if left:
            return left
    return ()


def _spread(calls: dict[PeerId, list[int]], choices: list[tuple[int, tuple[PeerId, ...]]]) -> None:
    """Gives each expert to one of its peers: to one that is asked anyway while that has less than its fair share, else
    to an idle one, else to the least loaded.  What had no choice is in `calls` already.
    """
    loads = {peer: len(calls.get(peer, ())) for _, peers in choices for peer in peers}
    fair = -(-(len(choices) + sum(loads.values())) // len(loads))
    for expert, peers in choices:
        best, best_cost = peers[0], 1 << 30
        for peer in peers:
            load = loads[peer]
            # In order: asked and below the fair share (few first), idle, full (few first).
            cost = load if 0 < load < fair else fair if load == 0 else fair + load
            if cost < best_cost:
                best, best_cost = peer, cost
        loads[best] += 1
        calls.setdefault(best, []).append(expert)
