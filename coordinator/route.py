"""Route: a session's stages in order, each with a standby.

Pure: equal view, shape and seed give equal routes.  A stage is the whole span of a peer: spans are served as they are
held.  Of equally good peers the better of two random ones is taken (Mitzenmacher 2001, "the power of two choices"), so
that doors with the same view do not herd onto one peer.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos import units
from protos.errors import UnitMissing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from collections.abc import Set as AbstractSet

    from coordinator.view import Record, View
    from protos.ids import PeerId, UnitName

# So many missing units are named; the rest is counted.
NAMED_MAX = 8
# A door computes a stage itself, where it can, until so many more sessions wait there than elsewhere: each crossing of
# the network that is saved is saved for every token.
HOME_QUEUE_MAX = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """The part of a manifest that a route needs."""

    layers: int
    experts: tuple[int, ...] = ()  # in each layer; empty: nobody asks for experts


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
    # Whether a stage asks other nodes for experts of its layers, and may so wait inside a step.
    fans_out: bool = False


def plan(
    view: View, shape: Shape, seed: int, avoid: AbstractSet[PeerId] = frozenset(), home: PeerId | None = None
) -> Route:
    """A chain of as few stages as the view allows, because each is one crossing of the network a token.

    Raises UnitMissing with the names that no live peer holds, or of layers that no chain of spans joins.  `avoid` is
    about stages: experts of these peers are used.  `home`: the door, which is preferred.
    """
    _check_experts(view, shape)
    spans: dict[tuple[int, int], list[PeerId]] = {}
    for peer in view.live():
        record = view.records[peer]
        if peer not in avoid and _is_stage(record, shape):
            spans.setdefault((record.layers.start, record.layers.stop), []).append(peer)
    hops = _hops_left(spans, shape.layers)
    if 0 not in hops:
        raise _missing(view, shape, spans, avoid)
    stages: list[StageRef] = []
    start = 0
    while start < shape.layers:
        ends = [stop for first, stop in spans if first == start and hops.get(stop) == hops[start] - 1]
        peers = [peer for stop in ends for peer in spans[start, stop]]
        chosen = _choose(view, peers, seed, len(stages), home)
        stop = view.records[chosen].layers.stop
        standby = next((peer for peer in _ranked(view, spans[start, stop], seed, len(stages)) if peer != chosen), None)
        stages.append(StageRef(chosen, start, stop - 1, standby))
        start = stop
    return Route(tuple(stages), any(_fans_out(view.records[stage.peer], shape) for stage in stages))


def _is_stage(record: Record, shape: Shape) -> bool:
    span = record.layers
    if not span or not 0 <= span.start < span.stop <= shape.layers:
        return False
    return (record.embed or span.start > 0) and (record.head or span.stop < shape.layers)


def _fans_out(record: Record, shape: Shape) -> bool:
    """Whether it lacks experts of the layers that it serves."""
    counts = [(layer, shape.experts[layer]) for layer in record.layers] if shape.experts else []
    return any(~record.experts.get(layer, 0) & ((1 << count) - 1) for layer, count in counts)


def _hops_left(spans: dict[tuple[int, int], list[PeerId]], layers: int) -> dict[int, int]:
    """From which boundaries the end can be reached, and in how many stages at least."""
    hops = {layers: 0}
    for start, stop in sorted(spans, reverse=True):  # whatever begins later is done
        if stop in hops:
            hops[start] = min(hops.get(start, layers), hops[stop] + 1)
    return hops


def _check_experts(view: View, shape: Shape) -> None:
    lost: list[UnitName] = []
    live = [view.records[peer].experts for peer in view.live()]
    for layer, count in enumerate(shape.experts):
        held = 0
        for experts in live:
            held |= experts.get(layer, 0)
        lost += [units.expert(layer, e) for e in range(count) if not held >> e & 1]
    if lost:
        raise UnitMissing(
            f"no live peer holds {_names(lost)}; wait for one that does, or start a node with these units"
        )


def _missing(
    view: View, shape: Shape, spans: dict[tuple[int, int], list[PeerId]], avoid: AbstractSet[PeerId]
) -> UnitMissing:
    live = [view.records[peer] for peer in view.live() if peer not in avoid]
    names = [] if any(record.embed for record in live) else [units.EMBED]
    names += [units.trunk(at) for at in range(shape.layers) if not any(at in record.layers for record in live)]
    names += [] if any(record.head for record in live) else [units.HEAD]
    besides = f" beside {', '.join(sorted(peer[:8] for peer in avoid))}, which failed" if avoid else ""
    if names:
        return UnitMissing(
            f"no live peer{besides} holds {_names(names)}; wait for one that does, or start a node with these units"
        )
    found = ", ".join(f"{start}-{stop - 1}" for start, stop in sorted(spans))
    return UnitMissing(f"the spans of live peers{besides} ({found}) do not join to all {shape.layers} layers")


def _names(names: Sequence[UnitName]) -> str:
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more


def _choose(view: View, peers: Sequence[PeerId], seed: int, stage: int, home: PeerId | None) -> PeerId:
    """Two drawn among the healthiest, of which the better one."""
    best = _ranked(view, peers, seed, stage)[0]
    if home is not None and home in peers and view.load_of(home).queue <= view.load_of(best).queue + HOME_QUEUE_MAX:
        return home
    return best


def _ranked(view: View, peers: Sequence[PeerId], seed: int, stage: int) -> list[PeerId]:
    healthiest = min(view.health_of(peer) for peer in peers)
    order = _shuffled([peer for peer in peers if view.health_of(peer) == healthiest], seed, stage)
    pair = sorted(order[:2], key=lambda peer: _cost(view, peer))
    return pair + order[2:] + _shuffled([peer for peer in peers if view.health_of(peer) != healthiest], seed, stage)


def _cost(view: View, peer: PeerId) -> tuple[int, float]:
    return view.load_of(peer).queue, view.rtt_of(peer)


def _shuffled(peers: Sequence[PeerId], seed: int, stage: int) -> list[PeerId]:
    """A keyed hash orders the peers: no generator whose state another decision could share."""
    return sorted(peers, key=lambda peer: hashlib.blake2b(f"{seed}/{stage}/{peer}".encode(), digest_size=8).digest())
