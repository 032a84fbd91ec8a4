"""Dispatch: every expert goes once to a holder that is not avoided; own, alive and near ones first, evenly spread."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.dispatch import Dispatch
from coordinator.view import Health, Record, View
from protos.ids import PeerId

ME, B, C, D = (PeerId(name) for name in ("me", "b", "c", "d"))
ALL8 = 0xFF


def dispatch(masks: dict[PeerId, int], *, me: PeerId = ME, layers: int = 1, **rest: dict[PeerId, object]) -> Dispatch:
    made = Dispatch(me, [8] * layers)
    records = {peer: Record(experts=dict.fromkeys(range(layers), mask)) for peer, mask in masks.items()}
    made.update(View(records, **rest))  # type: ignore[arg-type]
    return made


def order(found: Dispatch) -> list[PeerId]:
    """Who is asked for one expert, and who next when that one has failed."""
    asked: list[PeerId] = []
    while calls := found.assign(0, [0], {0: set(asked)}).calls:
        asked += calls
    return asked


def test_before_the_first_view_nobody_holds_anything() -> None:
    assignment = Dispatch(ME, [8]).assign(0, [3, 1])
    assert assignment.calls == {}
    assert assignment.unheld == [3, 1]


def test_own_experts_are_computed_here_and_the_others_by_who_holds_them() -> None:
    assignment = dispatch({ME: 0b0011, B: 0b0111, C: 0b1000}).assign(0, range(5))
    assert assignment.calls == {ME: [0, 1], B: [2], C: [3]}
    assert assignment.unheld == [4]


def test_alive_goes_before_suspect_before_dead_and_a_dead_one_is_asked_if_there_is_no_other() -> None:
    health = {B: Health.SUSPECT, C: Health.DEAD}
    found = dispatch({B: ALL8, C: ALL8, D: 0b1}, health=health)
    assert found.assign(0, [0]).calls == {D: [0]}
    assert found.assign(0, [1]).calls == {B: [1]}
    assert found.assign(0, [1], {1: {B}}).calls == {C: [1]}
    assert order(found) == [D, B, C]


def test_near_replicas_go_before_far_ones_but_not_before_their_health() -> None:
    found = dispatch({B: ALL8, C: ALL8, D: ALL8}, rtt_s={B: 0.05, C: 0.001, D: 0.001}, health={D: Health.SUSPECT})
    assert order(found) == [C, B, D]


def test_a_peer_that_was_asked_already_is_avoided_for_that_expert_alone() -> None:
    found = dispatch({B: ALL8, C: ALL8})
    assert found.assign(0, [0], {0: {B}}).calls == {C: [0]}
    assignment = found.assign(0, [0, 1], {0: {B, C}, 1: {C}})
    assert assignment.calls == {B: [1]}
    assert assignment.unheld == [0]


def test_equal_replicas_share_the_work_evenly() -> None:
    found = dispatch({B: ALL8, C: ALL8, D: ALL8})
    for count in range(1, 9):
        sizes = [len(experts) for experts in found.assign(0, range(count)).calls.values()]
        assert max(sizes) == -(-count // 3)


def test_no_more_peers_are_asked_than_an_even_share_takes() -> None:
    masks = {PeerId(f"peer{number}"): ALL8 for number in range(3)}
    assert len(dispatch(masks).assign(0, range(4)).calls) == 2


def test_what_only_one_peer_holds_counts_before_the_rest_is_spread() -> None:
    assert dispatch({B: ALL8, C: 0b1100}).assign(0, range(4)).calls == {B: [0, 1], C: [2, 3]}


def test_nodes_with_the_same_view_do_not_herd_and_over_many_layers_all_replicas_work() -> None:
    peers = [PeerId(f"peer{number}") for number in range(3)]
    work = Counter[PeerId]()
    for me in range(20):
        found = dispatch(dict.fromkeys(peers, ALL8), me=PeerId(f"door{me}"), layers=30)
        for layer in range(30):
            work.update(found.assign(layer, [layer % 8]).calls.keys())
    assert set(work) == set(peers)
    assert min(work.values()) > 600 / 3 * 0.8


def test_a_new_view_counts_at_once() -> None:
    found = dispatch({B: ALL8})
    assert found.assign(0, [0]).calls == {B: [0]}
    found.update(View({B: Record(experts={0: ALL8}), C: Record(experts={0: ALL8})}, health={B: Health.DEAD}))
    assert found.assign(0, [0]).calls == {C: [0]}
    found.update(View({}))
    assert found.assign(0, [0]).unheld == [0]


def test_what_a_record_says_beyond_the_model_is_not_used() -> None:
    found = Dispatch(ME, [2])
    found.update(View({B: Record(experts={0: ALL8, 7: ALL8})}))
    assert found.assign(0, [0, 1]).calls == {B: [0, 1]}
    with pytest.raises(IndexError):
        found.assign(0, [2])


PEERS = [ME, B, C, D]


@settings(max_examples=300, deadline=None)
@given(
    masks=st.dictionaries(st.sampled_from(PEERS), st.integers(0, ALL8)),
    health=st.dictionaries(st.sampled_from(PEERS), st.sampled_from(Health)),
    experts=st.lists(st.integers(0, 7), unique=True),
    avoid=st.dictionaries(st.integers(0, 7), st.frozensets(st.sampled_from(PEERS))),
)
def test_every_expert_goes_once_to_the_best_holder_left_or_is_listed(
    masks: dict[PeerId, int],
    health: dict[PeerId, Health],
    experts: list[int],
    avoid: dict[int, frozenset[PeerId]],
) -> None:
    assignment = dispatch(masks, health=health).assign(0, experts, avoid)
    given_out = [expert for call in assignment.calls.values() for expert in call]
    assert sorted(given_out + assignment.unheld) == sorted(experts)
    assert all(assignment.calls.values())
    view = View({}, health=health)

    def left(expert: int) -> set[PeerId]:
        return {peer for peer, mask in masks.items() if mask >> expert & 1} - avoid.get(expert, frozenset())

    for peer, call in assignment.calls.items():
        for expert in call:
            assert peer in left(expert)
            if ME in left(expert):
                assert peer == ME
            else:
                assert view.health_of(peer) == min(view.health_of(other) for other in left(expert))
    assert not any(left(expert) for expert in assignment.unheld)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32))
def test_equal_views_give_equal_assignments_in_whatever_order_they_were_learned(seed: int) -> None:
    shuffle = random.Random(seed)
    masks = {PeerId(f"peer{number}"): shuffle.getrandbits(8) for number in range(6)}
    turned = dict(shuffle.sample(list(masks.items()), len(masks)))
    assert dispatch(masks).assign(0, range(8)) == dispatch(turned).assign(0, range(8))
