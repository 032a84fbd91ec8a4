"""Route: a session's stages in order, each with a standby.

Pure: equal view, shape and seed give equal routes.  Of equally good peers the better of two random ones is taken
(Mitzenmacher 2001, "the power of two choices"), so that doors with the same view do not herd onto one peer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos import units
from protos.errors import UnitMissing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.view import Record, View
    from protos.ids import PeerId, UnitName


@dataclass(frozen=True, slots=True)
class Shape:
    """The part of a manifest that a route needs."""

    layers: int
    grain: int  # span boundaries lie on multiples of it, and at the end


@dataclass(frozen=True, slots=True)
class StageRef:
    """A span as one session uses it; both layers belong to it."""

    peer: PeerId
    first_layer: int
    last_layer: int
    standby: PeerId | None


@dataclass(frozen=True, slots=True)
class Route:
    stages: tuple[StageRef, ...]


# Cells are what a route must cover, in order: the embedding (-1), every layer, the head (= layers).
_EMBED = -1


def plan(view: View, shape: Shape, seed: int) -> Route:
    """A chain of as few stages as the view allows, because each is one crossing of the network a token.

    Raises UnitMissing with the names that no live peer holds, or that none holds together as one bundle of the grid.
    """
    held = {peer: _cells(view.records[peer], shape) for peer in view.live()}
    stages: list[StageRef] = []
    start = _EMBED
    while start <= shape.layers:
        stop, peers = _furthest(held, shape, start)
        peer, standby = _choose(view, peers, seed, len(stages))
        stages.append(StageRef(peer, max(start, 0), min(stop, shape.layers) - 1, standby))
        start = stop
    return Route(tuple(stages))


def _cells(record: Record, shape: Shape) -> frozenset[int]:
    ends = {_EMBED} if record.embed else set[int]()
    if record.head:
        ends.add(shape.layers)
    return record.layers | ends


def _furthest(held: dict[PeerId, frozenset[int]], shape: Shape, start: int) -> tuple[int, list[PeerId]]:
    """The furthest boundary that a stage from `start` reaches, and who reaches it (greedy cover is shortest)."""
    reach = {peer: _reach(cells, shape, start) for peer, cells in held.items()}
    stop = max(reach.values(), default=start)
    if stop == start:
        raise _missing(held, shape, start)
    return stop, [peer for peer, end in reach.items() if end == stop]


def _reach(cells: frozenset[int], shape: Shape, start: int) -> int:
    """The last boundary of the grid up to which `cells` has no hole; `start` if there is none."""
    end, best = start, start
    while end in cells:
        end += 1
        if end == shape.layers + 1 or (0 < end < shape.layers and end % shape.grain == 0):
            best = end
    return best


def _missing(held: dict[PeerId, frozenset[int]], shape: Shape, start: int) -> UnitMissing:
    everywhere = frozenset[int]().union(*held.values())
    holes = [cell for cell in range(_EMBED, shape.layers + 1) if cell not in everywhere]
    if holes:
        names = ", ".join(_name(cell, shape) for cell in holes)
        return UnitMissing(f"no live peer holds {names}; wait for one that does, or start a node with these units")
    stop = _next_boundary(shape, start)
    names = ", ".join(_name(cell, shape) for cell in range(start, stop))
    return UnitMissing(f"no live peer holds {names} together, as one stage needs; start a node with this span")


def _next_boundary(shape: Shape, start: int) -> int:
    stop = (max(start, 0) // shape.grain + 1) * shape.grain
    return stop if stop < shape.layers else shape.layers + 1


def _name(cell: int, shape: Shape) -> UnitName:
    if cell == _EMBED:
        return units.EMBED
    return units.HEAD if cell == shape.layers else units.trunk(cell)


def _choose(view: View, peers: Sequence[PeerId], seed: int, stage: int) -> tuple[PeerId, PeerId | None]:
    """The peer that computes and its standby: two drawn among the healthiest, the better one first."""
    healthiest = min(view.health_of(peer) for peer in peers)
    order = _shuffled([peer for peer in peers if view.health_of(peer) == healthiest], seed, stage)
    pair = sorted(order[:2], key=lambda peer: _cost(view, peer))
    rest = order[2:] + _shuffled([peer for peer in peers if view.health_of(peer) != healthiest], seed, stage)
    ranked = pair + rest
    return ranked[0], ranked[1] if len(ranked) > 1 else None


def _cost(view: View, peer: PeerId) -> tuple[int, float]:
    return view.load_of(peer).queue, view.rtt_of(peer)


def _shuffled(peers: Sequence[PeerId], seed: int, stage: int) -> list[PeerId]:
    """A keyed hash orders the peers: no generator whose state another decision could share."""
    return sorted(peers, key=lambda peer: hashlib.blake2b(f"{seed}/{stage}/{peer}".encode(), digest_size=8).digest())
