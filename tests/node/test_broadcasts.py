"""What rides on messages: order, how often, how much fits."""

from __future__ import annotations

import pytest
from toy_membership import START, claim, peer, suspicion

from node.broadcasts import Broadcasts, retransmissions_max
from node.claim import encoded_bytes

ROOM = 10_000


def test_what_was_told_least_goes_first_and_the_newest_of_those() -> None:
    queue = Broadcasts(100)
    for number in (1, 2, 3):
        queue.add(claim(number))
    assert queue.take(ROOM, 2, 9, 4) == [claim(3), claim(2)]
    assert queue.take(ROOM, 2, 9, 4) == [claim(1), claim(2)]


def test_claims_go_before_suspicions() -> None:
    queue = Broadcasts(100)
    for item in (suspicion(1, 2), claim(5), suspicion(1, 3)):
        queue.add(item)
    assert queue.take(ROOM, 8, 9, 4) == [claim(5), suspicion(1, 3), suspicion(1, 2)]


@pytest.mark.parametrize(("members", "times"), [(1, 4), (9, 4), (10, 8), (99, 8), (1000, 16), (10_000, 20)])
def test_an_item_is_told_lambda_log_n_times(members: int, times: int) -> None:
    assert retransmissions_max(members, 4) == times
    queue = Broadcasts(100)
    queue.add(claim(1))
    assert [len(queue.take(ROOM, 8, members, 4)) for _ in range(times + 1)] == [1] * times + [0]
    assert len(queue) == 0


def test_a_newer_claim_takes_the_place_of_an_older_one_and_is_told_as_often_as_a_new_one() -> None:
    queue = Broadcasts(100)
    queue.add(claim(1))
    queue.take(ROOM, 8, 9, 4)
    queue.add(claim(1, START + 1))
    assert len(queue) == 1
    assert [queue.take(ROOM, 8, 9, 4) for _ in range(5)] == [[claim(1, START + 1)]] * 4 + [[]]


def test_suspicions_of_different_accusers_do_not_replace_each_other_and_can_be_taken_back() -> None:
    queue = Broadcasts(100)
    queue.add(suspicion(1, 2))
    queue.add(suspicion(1, 3))
    queue.discard_suspicion(peer(1), peer(2))
    queue.discard_suspicion(peer(1), peer(9))
    assert queue.take(ROOM, 8, 9, 4) == [suspicion(1, 3)]


def test_as_many_items_are_taken_as_fit_and_a_small_one_fills_the_rest() -> None:
    queue = Broadcasts(100)
    small, large = claim(1), suspicion(2, 3)
    room = encoded_bytes(small) + encoded_bytes(large)
    for item in (small, suspicion(2, 4), large):
        queue.add(item)
    assert queue.take(room, 8, 9, 4) == [small, large]
    assert queue.take(encoded_bytes(small) - 1, 8, 9, 4) == []
    assert queue.take(50, 8, 9, 4) == []


def test_when_the_queue_is_full_the_one_told_most_often_goes_and_that_is_said() -> None:
    queue = Broadcasts(3)
    assert [queue.add(claim(number)) for number in (1, 2, 3)] == [True] * 3
    queue.take(ROOM, 1, 99, 4)  # 3 has been told once
    assert not queue.add(claim(4))
    assert not queue.add(claim(5))  # 1 is the oldest of those that were never told
    assert queue.take(ROOM, 8, 9, 4) == [claim(5), claim(4), claim(2)]
    assert queue.add(claim(4, START + 1))
