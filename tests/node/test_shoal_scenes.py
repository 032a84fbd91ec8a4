"""PROTOCOL.md section 15: scenes between a few nodes, from a crash to a healed partition."""

from __future__ import annotations

import pytest
from toy_membership import START, Shoal, census, core, of, peer

from node.member import State
from node.membership_effect import Changed
from node.membership_event import Deaf, Doubt, Leave
from node.profile import LAN, MEMBERLIST_LAN, MEMBERLIST_WAN, PLAIN_SWIM, WAN


def test_nodes_that_answer_are_never_suspected() -> None:
    shoal = Shoal(5)
    shoal.run(60)
    assert not of((effect for _, _, effect in shoal.effects), Changed)
    assert {node.health for node in shoal.nodes.values()} == {0}


def test_a_node_that_no_answer_reaches_accuses_nobody_and_goes_by_what_others_say() -> None:
    shoal = Shoal(5)
    shoal.cut = lambda _from, to: to == peer(3)
    shoal._meet = lambda one, other: one == peer(3) or peer(3) not in (one, other)
    shoal.run(3)
    assert State.SUSPECT in [shoal.state(n, at=3) for n in (0, 1, 2, 4)]
    shoal.tell(3, Deaf(True))
    shoal.tell(3, Deaf(True))
    assert [shoal.state(n, at=3) for n in (0, 1, 2, 4)] == [State.ALIVE] * 4
    shoal.tell(3, Doubt(peer(1)))
    shoal.effects.clear()
    shoal.run(120)
    changes = of((effect for _, who, effect in shoal.effects if who == peer(3)), Changed)
    assert State.DEAD not in {change.after for change in changes}
    assert [shoal.state(n, at=3) for n in (0, 1, 2, 4)] == [State.ALIVE] * 4
    assert [shoal.state(3, at=n) for n in (0, 1, 2, 4)] == [State.DEAD] * 4
    assert {n: shoal.state(n, at=0) for n in (1, 2, 4)} == dict.fromkeys((1, 2, 4), State.ALIVE)
    shoal.stop(4)
    shoal.run(240)
    assert shoal.state(4, at=3) is State.DEAD
    del shoal._meet
    shoal.cut = lambda _from, _to: False
    shoal.tell(3, Deaf(False))
    shoal.run(5)
    assert [shoal.state(3, at=n) for n in (0, 1, 2)] == [State.ALIVE] * 3


@pytest.mark.parametrize("profile", [LAN, PLAIN_SWIM, MEMBERLIST_LAN], ids=["LAN", "plain", "memberlist"])
def test_a_node_that_crashed_is_dead_for_all_after_their_own_timers(profile) -> None:
    shoal = Shoal(5, profile=profile)
    shoal.stop(4)
    shoal.run(30)
    assert [shoal.state(4, at) for at in range(4)] == [State.DEAD] * 4
    assert [len(shoal[at]) for at in range(4)] == [4] * 4


@pytest.mark.parametrize("profile", [WAN, MEMBERLIST_WAN], ids=["WAN", "memberlist"])
def test_over_a_wan_the_same_takes_longer(profile) -> None:
    shoal = Shoal(5, profile=profile)
    shoal.stop(4)
    shoal.run(20)
    assert State.DEAD not in [shoal.state(4, at) for at in range(4)]
    shoal.run(100)
    assert [shoal.state(4, at) for at in range(4)] == [State.DEAD] * 4


def test_a_node_that_only_some_cannot_reach_stays_alive_through_helpers() -> None:
    shoal = Shoal(5)
    shoal.cut = lambda a, b: {a, b} == {peer(0), peer(1)}
    shoal.run(60)
    assert not of((effect for _, _, effect in shoal.effects), Changed)


def test_a_leave_is_told_apart_from_a_death() -> None:
    shoal = Shoal(5)
    shoal.run(2)
    shoal.tell(4, Leave())
    shoal.run(3)
    assert shoal[4].deadline is None
    shoal.stop(4)
    shoal.run(60)
    assert [shoal.state(4, at) for at in range(4)] == [State.LEFT] * 4
    assert State.SUSPECT not in [e.after for _, _, e in shoal.effects if isinstance(e, Changed)]


def test_a_healed_partition_is_found_and_everybody_lives_again() -> None:
    shoal = Shoal(6)
    shoal.cut = lambda a, b: (a in {peer(0), peer(1)}) != (b in {peer(0), peer(1)})
    shoal.run(60)
    assert shoal.state(0, at=3) == State.DEAD
    assert shoal.state(3, at=0) == State.DEAD  # the few are ill, and gave others half as much time again, no more
    assert shoal.state(4, at=3) == State.ALIVE
    shoal.cut = lambda _a, _b: False
    shoal.run(30)
    assert {shoal.state(a, b) for a in range(6) for b in range(6) if a != b} == {State.ALIVE}


def test_a_newcomer_that_one_node_knows_is_known_to_all_after_push_pulls() -> None:
    shoal = Shoal(4)
    shoal.nodes[peer(9)] = core(9, now=0.0)
    shoal.tell(9, shoal.push(peer(0)))
    shoal.tell(0, shoal.push(peer(9)))
    shoal.run(15)
    assert [shoal.state(9, at) for at in range(4)] == [State.ALIVE] * 4
    assert len(shoal[9]) == 5


def test_a_node_that_restarts_outranks_its_past_and_its_death() -> None:
    shoal = Shoal(4)
    shoal.stop(3)
    shoal.run(30)
    shoal.stopped.clear()
    shoal.nodes[peer(3)] = core(3, census(4), incarnation=START + 30_000, now=shoal.now)
    shoal.run(10)
    assert [shoal.state(3, at) for at in range(3)] == [State.ALIVE] * 3


def test_a_node_whose_clock_went_back_before_it_restarted_goes_above_its_past() -> None:
    shoal = Shoal(4)
    shoal.stop(3)
    shoal.run(30)
    shoal.stopped.clear()
    shoal.nodes[peer(3)] = core(3, census(4), incarnation=START - 5000, now=shoal.now)
    shoal.run(15)
    assert [shoal.state(3, at) for at in range(3)] == [State.ALIVE] * 3
    assert shoal[3].claim.incarnation > START


def test_a_node_that_left_and_came_back_with_an_older_clock_goes_above_its_farewell() -> None:
    shoal = Shoal(4)
    shoal.tell(3, Leave())
    shoal.run(5)
    shoal.nodes[peer(3)] = core(3, census(4), incarnation=START - 5000, now=shoal.now)
    shoal.run(10)
    assert [shoal.state(3, at) for at in range(3)] == [State.ALIVE] * 3


def test_equal_events_and_randomness_give_equal_effects() -> None:
    first, second = Shoal(5, seed=7), Shoal(5, seed=7)
    for shoal in (first, second):
        shoal.stop(2)
        shoal.run(20)
    assert first.effects == second.effects
    assert first.effects != Shoal(5, seed=8).effects
