"""Routes: every layer is covered, in as few stages as the view allows; what is missing is named."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.route import Route, Shape, StageRef, plan
from coordinator.view import Health, Load, Record, View
from protos.errors import UnitMissing
from protos.ids import PeerId

A, B, C, D = (PeerId(name) for name in "abcd")


def whole(layers: int) -> Record:
    return Record(frozenset(range(layers)), embed=True, head=True)


def span(first: int, stop: int, *, embed: bool = False, head: bool = False) -> Record:
    return Record(frozenset(range(first, stop)), embed=embed, head=head)


def test_one_node_that_holds_everything_is_a_route_of_one_stage() -> None:
    assert plan(View({A: whole(4)}), Shape(4, 1), 0) == Route((StageRef(A, 0, 3, None),))


def test_spans_are_chained_in_order() -> None:
    view = View({A: span(0, 2, embed=True), B: span(2, 4, head=True)})
    assert plan(view, Shape(4, 2), 0).stages == (StageRef(A, 0, 1, None), StageRef(B, 2, 3, None))


def test_fewer_stages_win_over_many() -> None:
    view = View({A: span(0, 2, embed=True), B: span(2, 4, head=True), C: whole(4)})
    assert plan(view, Shape(4, 2), 0).stages == (StageRef(C, 0, 3, None),)


def test_a_stage_ends_on_the_grid() -> None:
    view = View({A: span(0, 3, embed=True), B: span(2, 4, head=True)})
    assert [stage.last_layer for stage in plan(view, Shape(4, 2), 0).stages] == [1, 3]


def test_a_last_bundle_may_be_shorter_than_the_grain() -> None:
    view = View({A: span(0, 2, embed=True), B: span(2, 3, head=True)})
    assert [stage.first_layer for stage in plan(view, Shape(3, 2), 0).stages] == [0, 2]


def test_the_other_one_of_two_is_the_standby() -> None:
    view = View({A: whole(2), B: whole(2)}, loads={A: Load(queue=3)})
    assert plan(view, Shape(2, 1), 7).stages == (StageRef(B, 0, 1, A),)


def test_of_two_random_ones_the_better_is_taken_so_the_worst_never_is() -> None:
    view = View({peer: whole(1) for peer in (A, B, C, D)}, loads={A: Load(queue=9)}, rtt_s={B: 0.01, C: 0.02})
    chosen = {plan(view, Shape(1, 1), seed).stages[0].peer for seed in range(64)}
    assert chosen == {B, C, D}


def test_equal_arguments_give_equal_routes() -> None:
    records = {A: whole(2), B: whole(2), C: whole(2)}
    backwards = dict(reversed(records.items()))
    assert plan(View(records), Shape(2, 1), 5) == plan(View(backwards), Shape(2, 1), 5)


def test_a_dead_peer_is_never_chosen_and_a_suspect_one_only_if_there_is_no_other() -> None:
    view = View({A: whole(1), B: whole(1), C: whole(1)}, health={A: Health.DEAD, B: Health.SUSPECT})
    assert plan(view, Shape(1, 1), 0).stages == (StageRef(C, 0, 0, B),)


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ({}, "embed, trunk.0, trunk.1, head"),
        ({A: span(0, 2, embed=True)}, "head"),
        ({A: span(0, 2, head=True)}, "embed"),
        ({A: Record(frozenset({0}), embed=True, head=True)}, "trunk.1"),
    ],
)
def test_units_that_nobody_holds_are_named(records: dict[PeerId, Record], names: str) -> None:
    with pytest.raises(UnitMissing, match=f"no live peer holds {names};"):
        plan(View(records), Shape(2, 1), 0)


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ({A: span(0, 0, embed=True), B: span(0, 4, head=True)}, "embed, trunk.0, trunk.1"),
        ({A: span(0, 3, embed=True), B: span(3, 4, head=True)}, "trunk.2, trunk.3, head"),
    ],
)
def test_a_bundle_that_nobody_holds_whole_is_named(records: dict[PeerId, Record], names: str) -> None:
    with pytest.raises(UnitMissing, match=f"{names} together"):
        plan(View(records), Shape(4, 2), 0)


records = st.builds(
    Record, layers=st.frozensets(st.integers(0, 5), max_size=6), embed=st.booleans(), head=st.booleans()
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from([A, B, C, D]), records), st.integers(1, 4), st.integers(0, 9))
def test_a_route_covers_every_layer_once_with_peers_that_hold_them(
    held: dict[PeerId, Record], grain: int, seed: int
) -> None:
    try:
        stages = plan(View(held), Shape(6, grain), seed).stages
    except UnitMissing:
        return
    assert [layer for stage in stages for layer in range(stage.first_layer, stage.last_layer + 1)] == list(range(6))
    assert held[stages[0].peer].embed
    assert held[stages[-1].peer].head
    for stage in stages:
        for peer in {stage.peer, stage.standby} - {None}:
            assert held[peer].layers >= set(range(stage.first_layer, stage.last_layer + 1))
        assert stage.first_layer % grain == 0
        assert stage.standby != stage.peer
