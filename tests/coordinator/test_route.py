"""Routes: every layer is covered by whole spans, in as few stages as the view allows; what is missing is named."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.route import HOME_QUEUE_MAX, NAMED_MAX, Route, Shape, StageRef, plan
from coordinator.view import Health, Load, Record, View
from protos.errors import UnitMissing
from protos.ids import PeerId

A, B, C, D, E = (PeerId(name) for name in "abcde")


def span(first: int, stop: int, *, embed: bool = False, head: bool = False) -> Record:
    return Record(layers=range(first, stop), embed=embed, head=head)


def whole(layers: int) -> Record:
    return span(0, layers, embed=True, head=True)


def test_one_node_that_holds_everything_is_a_route_of_one_stage() -> None:
    assert plan(View({A: whole(4)}), Shape(4), 0) == Route((StageRef(A, 0, 3, None),))


def test_spans_are_chained_in_order() -> None:
    view = View({A: span(0, 2, embed=True), B: span(2, 4, head=True)})
    assert plan(view, Shape(4), 0).stages == (StageRef(A, 0, 1, None), StageRef(B, 2, 3, None))


def test_fewer_stages_win_over_many() -> None:
    view = View({A: span(0, 2, embed=True), B: span(2, 4, head=True), C: whole(4)})
    assert plan(view, Shape(4), 0).stages == (StageRef(C, 0, 3, None),)


def test_a_longer_first_step_that_leads_nowhere_is_not_taken() -> None:
    view = View({A: span(0, 3, embed=True), B: span(0, 2, embed=True), C: span(2, 4, head=True)})
    assert [stage.peer for stage in plan(view, Shape(4), 0).stages] == [B, C]


def test_a_span_is_served_whole_so_one_that_overlaps_joins_nothing() -> None:
    view = View({A: span(0, 3, embed=True), B: span(2, 4, head=True)})
    with pytest.raises(UnitMissing, match=r"the spans of live peers \(0-2, 2-3\) do not join to all 4 layers"):
        plan(view, Shape(4), 0)


def test_the_other_one_of_two_is_the_standby_if_its_span_is_the_same() -> None:
    view = View({A: whole(2), B: whole(2)}, loads={A: Load(queue=3)})
    assert plan(view, Shape(2), 7).stages == (StageRef(B, 0, 1, A),)


def test_of_two_random_ones_the_better_is_taken_so_the_worst_never_is() -> None:
    view = View({peer: whole(1) for peer in (A, B, C, D)}, loads={A: Load(queue=9)}, rtt_s={B: 0.01, C: 0.02})
    chosen = {plan(view, Shape(1), seed).stages[0].peer for seed in range(64)}
    assert chosen == {B, C, D}


def test_equal_arguments_give_equal_routes() -> None:
    records = {A: whole(2), B: whole(2), C: whole(2)}
    backwards = dict(reversed(records.items()))
    assert plan(View(records), Shape(2), 5) == plan(View(backwards), Shape(2), 5)


def test_a_dead_peer_is_never_chosen_and_a_suspect_one_only_if_there_is_no_other() -> None:
    view = View({A: whole(1), B: whole(1), C: whole(1)}, health={A: Health.DEAD, B: Health.SUSPECT})
    assert plan(view, Shape(1), 0).stages == (StageRef(C, 0, 0, B),)


def test_the_door_computes_a_stage_itself_until_it_is_too_busy() -> None:
    records = {A: whole(1), B: whole(1), C: whole(1)}
    busy = View(records, loads={A: Load(queue=HOME_QUEUE_MAX)})
    too_busy = View(records, loads={A: Load(queue=HOME_QUEUE_MAX + 1)})
    assert {plan(busy, Shape(1), seed, home=A).stages[0].peer for seed in range(16)} == {A}
    assert {plan(too_busy, Shape(1), seed, home=A).stages[0].peer for seed in range(16)} == {B, C}


def test_the_door_is_no_detour() -> None:
    view = View({A: span(0, 1, embed=True), B: span(1, 2, head=True), C: whole(2)})
    assert plan(view, Shape(2), 0, home=A).stages[0].peer == C


def test_who_is_avoided_is_no_stage_and_no_standby_and_named_if_nobody_is_left() -> None:
    view = View({A: whole(1), B: whole(1)})
    assert plan(view, Shape(1), 0, frozenset({A})).stages == (StageRef(B, 0, 0, None),)
    assert plan(view, Shape(1), 0, frozenset({A}), home=A).stages[0].peer == B
    with pytest.raises(UnitMissing, match=r"no live peer beside a, b, which failed holds embed, trunk\.0, head;"):
        plan(view, Shape(1), 0, frozenset({A, B}))


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ({}, "embed, trunk.0, trunk.1, head"),
        ({A: span(0, 2, embed=True)}, "head"),
        ({A: span(0, 2, head=True)}, "embed"),
        ({A: span(0, 1, embed=True), B: span(0, 0, head=True)}, "trunk.1"),
    ],
)
def test_units_that_nobody_holds_are_named(records: dict[PeerId, Record], names: str) -> None:
    with pytest.raises(UnitMissing, match=f"no live peer holds {names};"):
        plan(View(records), Shape(2), 0)


def test_a_route_says_whether_a_stage_asks_other_nodes_for_experts() -> None:
    shape = Shape(2, experts=(0, 3))
    leaf = Record(experts={1: 0b111})
    assert not plan(View({A: with_experts({1: 0b111}), B: leaf}), shape, 0).fans_out
    assert plan(View({A: with_experts({1: 0b011}), B: leaf}), shape, 0).fans_out


def with_experts(experts: dict[int, int]) -> Record:
    return Record(layers=range(2), embed=True, head=True, experts=experts)


def test_experts_that_no_live_peer_holds_are_named_also_if_the_peer_is_only_avoided_as_a_stage() -> None:
    shape = Shape(2, experts=(0, 3))
    records = {A: with_experts({1: 0b001}), B: Record(experts={1: 0b110})}
    assert plan(View(records), shape, 0, frozenset({B})).stages[0].peer == A
    with pytest.raises(UnitMissing, match=r"no live peer holds expert\.1\.1, expert\.1\.2;"):
        plan(View(records, health={B: Health.DEAD}), shape, 0)


def test_of_many_missing_units_the_first_are_named_and_the_rest_counted() -> None:
    with pytest.raises(UnitMissing, match=f"and {64 - NAMED_MAX} more") as caught:
        plan(View({A: with_experts({})}), Shape(2, experts=(64,)), 0)
    assert caught.value.message.count("expert.0.") == NAMED_MAX


LAYERS = 5
records = st.builds(
    lambda a, b, embed, head, experts: Record(
        layers=range(min(a, b), max(a, b)), embed=embed, head=head, experts={0: experts}
    ),
    *[st.integers(0, LAYERS + 1), st.integers(0, LAYERS + 1), st.booleans(), st.booleans(), st.integers(0, 3)],
)
views = st.builds(
    View,
    st.dictionaries(st.sampled_from([A, B, C, D, E]), records),
    health=st.dictionaries(st.sampled_from([A, B]), st.sampled_from(Health)),
    loads=st.dictionaries(st.sampled_from([A, C]), st.builds(Load, queue=st.integers(0, 9))),
)


def usable(view: View, peer: PeerId, first: int, last: int) -> bool:
    record = view.records[peer]
    if view.health_of(peer) is Health.DEAD or record.layers != range(first, last + 1) or last >= LAYERS:
        return False
    return (record.embed or first > 0) and (record.head or last < LAYERS - 1)


def fewest_stages(view: View, avoid: frozenset[PeerId]) -> int | None:
    """By trying every chain of peers, short ones first."""
    for count in range(1, LAYERS + 1):
        for chain in permutations([peer for peer in view.records if peer not in avoid], count):
            spans = [view.records[peer].layers for peer in chain]
            joined = [layer for layers in spans for layer in layers] == list(range(LAYERS)) and all(spans)
            if joined and all(usable(view, peer, s[0], s[-1]) for peer, s in zip(chain, spans, strict=True)):
                return count
    return None


@settings(max_examples=400, deadline=None)
@given(
    views, st.frozensets(st.sampled_from([A, B, C]), max_size=2), st.integers(0, 9), st.sampled_from([A, B, C, None])
)
def test_a_route_is_a_shortest_chain_of_whole_spans_or_there_is_none(
    view: View, avoid: frozenset[PeerId], seed: int, home: PeerId | None
) -> None:
    try:
        stages = plan(view, Shape(LAYERS), seed, avoid, home).stages
    except UnitMissing:
        assert fewest_stages(view, avoid) is None
        return
    assert len(stages) == fewest_stages(view, avoid)
    assert [at for stage in stages for at in range(stage.first_layer, stage.last_layer + 1)] == list(range(LAYERS))
    for stage in stages:
        for peer in {stage.peer, stage.standby} - {None}:
            assert usable(view, peer, stage.first_layer, stage.last_layer)
            assert peer not in avoid
        assert stage.standby != stage.peer


@settings(max_examples=100, deadline=None)
@given(views, st.integers(0, 3))
def test_experts_are_missing_exactly_where_no_live_peer_holds_them(view: View, mask: int) -> None:
    records = {**view.records, PeerId("whole"): Record(layers=range(1), embed=True, head=True, experts={0: mask})}
    view = View(records, health=view.health)
    held = 0
    for peer in view.live():
        held |= records[peer].experts[0]
    if held & 0b11 == 0b11:
        assert plan(view, Shape(1, experts=(2,)), 0)
    else:
        with pytest.raises(UnitMissing, match=r"expert\.0\."):
            plan(view, Shape(1, experts=(2,)), 0)
