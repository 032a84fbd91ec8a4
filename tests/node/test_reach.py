"""Which peers answer, and whom to try next.  No network, no clock."""

from __future__ import annotations

from random import Random

import pytest

from coordinator.view import Health
from node.reach import RETRY_S_MAX, TRIES_MAX, Reach
from protos.ids import PeerId

A, B, C = PeerId("a"), PeerId("b"), PeerId("c")


def due(reach: Reach, now: float, *peers: PeerId, count_max: int = 8) -> list[PeerId]:
    return sorted(reach.due(peers, now, Random(1), count_max))


def test_a_peer_is_suspect_until_it_answers_and_dead_after_so_many_failed_tries() -> None:
    reach = Reach(1.0)
    assert reach.state(A) is Health.SUSPECT
    assert not reach.reached(A)
    reach.answered(A, 0.01, 0.0)
    assert reach.state(A) is Health.ALIVE
    for _ in range(TRIES_MAX - 1):
        reach.missed(A, "why", 0.0)
        assert reach.state(A) is Health.SUSPECT
    reach.missed(A, "why", 0.0)
    assert (reach.state(A), reach.last_error(A)) == (Health.DEAD, "why")
    reach.answered(A, 0.01, 0.0)
    assert reach.state(A) is Health.ALIVE
    assert reach.reached(A)


def test_who_was_never_reached_is_tried_at_once_and_one_of_the_others_at_random() -> None:
    reach = Reach(1.0)
    assert due(reach, 0.0, A, B, C) == [A, B, C]
    reach.answered(A, 0.01, 0.0)
    reach.answered(B, 0.01, 0.0)
    assert C in due(reach, 0.0, A, B, C)
    assert len(due(reach, 0.0, A, B, C)) == 2
    assert {peer for n in range(20) for peer in reach.due([A, B], 0.0, Random(n), 8)} == {A, B}


def test_no_more_are_tried_than_there_is_room_for() -> None:
    reach = Reach(1.0)
    assert len(due(reach, 0.0, A, B, C, count_max=2)) == 2
    assert due(reach, 0.0, A, B, C, count_max=0) == []


def test_a_peer_that_does_not_answer_is_tried_each_period_and_later_less_often_but_for_ever() -> None:
    reach, now, gaps = Reach(1.0), 0.0, []
    for _ in range(40):
        reach.missed(A, "", now)
        until = now
        while not due(reach, until, A):
            until += 0.25
        gaps.append(until - now)
        now = until
    assert gaps[:TRIES_MAX] == [1.0] * TRIES_MAX
    assert gaps == sorted(gaps)
    assert set(gaps[10:]) == {RETRY_S_MAX}


def test_the_last_place_is_for_peers_that_are_well() -> None:
    reach = Reach(1.0)
    reach.answered(A, 0.01, 0.0)
    assert due(reach, 0.0, B, C, count_max=2) in ([B], [C])  # A is being asked now
    assert due(reach, 0.0, B, C, count_max=1) == []
    assert due(reach, 0.0, A, B, C, count_max=1) == [A]
    reach.missed(A, "", 0.0)
    assert len(due(reach, 1.0, B, C, count_max=2)) == 2


def test_a_sign_of_life_brings_the_next_try_of_a_dead_peer_but_does_not_replace_it() -> None:
    reach = Reach(1.0)
    for _ in range(TRIES_MAX):
        reach.missed(A, "", 0.0)
    assert due(reach, 0.5, A) == []
    reach.heard(A, 0.5)
    assert due(reach, 0.5, A) == [A]
    assert reach.state(A) is Health.DEAD
    assert reach.age_s(A, 2.0) == 1.5


def test_a_failed_call_elsewhere_brings_a_try_and_kills_nobody() -> None:
    reach = Reach(1.0)
    reach.answered(A, 0.01, 0.0)
    for _ in range(10):
        reach.suspect(A, 0.0)
    assert reach.state(A) is Health.SUSPECT
    assert due(reach, 0.0, A) == [A]


def test_the_round_trip_time_is_averaged() -> None:
    reach = Reach(1.0)
    assert reach.rtt_s(A) is None
    reach.answered(A, 0.8, 0.0)
    reach.answered(A, 0.0, 0.0)
    assert reach.rtt_s(A) == pytest.approx(0.7)
    reach.forget(A)
    assert (reach.rtt_s(A), reach.age_s(A, 0.0), reach.last_error(A)) == (None, None, "")
