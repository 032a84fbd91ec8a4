"""Dealing a model to a testnet's nodes: everything is held, as often as was asked."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.topology import NODES_MAX, Topology, choose, places
from protos.errors import InvalidRequest


def held(hold: tuple[str, ...], layers: int, experts: int) -> tuple[set[int], set[tuple[int, int]]]:
    """Trunk layers and (layer, expert) that such flags mean: a second reading of the syntax, for these few forms."""
    trunk: set[int] = set()
    parts: set[tuple[int, int]] = set()
    for text in hold:
        kind, _, rest = text.partition(":")
        where, _, which = rest.partition("/")
        first, last = (0, layers - 1) if where == "*" else map(int, where.split("-"))
        span = range(first, last + 1)
        if kind in ("span", "trunk"):
            trunk.update(span)
        if kind == "span":
            parts.update((layer, expert) for layer in span for expert in range(experts))
        if kind == "experts":
            rule = re.fullmatch(r"(\d+)%(\d+)", which)
            chosen = (e for e in range(experts) if rule is None or e % int(rule[2]) == int(rule[1]))
            parts.update((layer, expert) for expert in list(chosen) for layer in span)
    return trunk, parts


@st.composite
def topologies(draw: st.DrawFn) -> tuple[Topology, int, int]:
    layers, grain = draw(st.integers(1, 40)), draw(st.integers(1, 5))
    nodes = draw(st.integers(1, 8))
    spans = draw(st.integers(0, min(nodes, -(-layers // grain))))
    experts = draw(st.sampled_from(("spread", "own") if spans else ("spread",)))
    replicas = draw(st.integers(1, nodes if experts == "spread" else nodes // spans))
    return Topology(nodes, spans, experts, replicas, draw(st.integers(1, nodes))), layers, grain


@given(topologies())
def test_everything_is_held_as_often_as_was_asked(case: tuple[Topology, int, int]) -> None:
    topology, layers, grain = case
    experts = 2 * topology.nodes
    dealt = places(topology, layers, grain)
    assert len(dealt) == topology.nodes
    trunks: Counter[int] = Counter()
    parts: Counter[tuple[int, int]] = Counter()
    for place in dealt:
        trunk, own = held(place.hold, layers, experts)
        assert not trunk or max(trunk) - min(trunk) + 1 == len(trunk)
        assert min(trunk) % grain == 0
        assert (max(trunk) + 1) % grain == 0 or max(trunk) + 1 == layers
        trunks.update(trunk)
        parts.update(own)
    assert set(trunks) == set(range(layers))
    assert len(parts) == layers * experts
    assert min(parts.values()) >= topology.replicas
    assert len({place.zone for place in dealt}) == topology.zones


def test_spread_over_four_with_two_replicas_is_the_documented_form() -> None:
    dealt = places(choose(4, None, 0, None, 1), layers=30, grain=1)
    assert dealt[0].hold == ("trunk:*", "experts:*/1%4", "experts:*/2%4")
    assert dealt[3].hold == ("trunk:*", "experts:*/0%4", "experts:*/1%4")


def test_only_the_first_nodes_hold_a_trunk_if_so_many_are_said() -> None:
    dealt = places(Topology(3, replicas=2, trunks=1), layers=30, grain=1)
    assert [place.hold for place in dealt] == [
        ("trunk:*", "experts:*/1%3", "experts:*/2%3"),
        ("experts:*/2%3", "experts:*/0%3"),
        ("experts:*/0%3", "experts:*/1%3"),
    ]


def test_spans_hold_their_own_experts_unless_these_are_spread() -> None:
    assert [place.hold for place in places(choose(2, None, 2, None, 1), 30, 4)] == [("span:0-15",), ("span:16-29",)]
    assert places(choose(2, "spread", 2, 1, 1), 30, 1)[0].hold == ("trunk:0-14", "experts:*/1%2")


@pytest.mark.parametrize(
    ("nodes", "spans", "replicas"), [(1, 0, 1), (4, 0, 2), (4, 2, 2), (4, 4, 1), (6, 2, 2), (3, 2, 1)]
)
def test_replicas_are_two_where_there_is_room(nodes: int, spans: int, replicas: int) -> None:
    assert choose(nodes, None, spans, None, 1).replicas == replicas


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        (Topology(0), "-n is 0"),
        (Topology(NODES_MAX + 1), "-n is 65"),
        (Topology(4, trunks=0), "0 of 4 nodes hold a trunk"),
        (Topology(4, spans=3, trunks=2), "it must be 3 to 4"),
        (Topology(4, zones=5), "--zones is 5"),
        (Topology(4, zones=0), "--zones is 0"),
        (Topology(4, spans=5), "allow 1 to 4"),
        (Topology(4, spans=-1), "--spans is -1"),
        (Topology(64, spans=31), "allow 1 to 30"),
        (Topology(4, replicas=5), "--replicas is 5"),
        (Topology(4, replicas=0), "--replicas is 0"),
        (Topology(4, spans=4, experts="own", replicas=2), "need 8 nodes"),
        (Topology(4, experts="own", replicas=2), "--experts own is for --spans"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_option(topology: Topology, says: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(says)):
        places(topology, layers=30, grain=1)
