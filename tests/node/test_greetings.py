"""node.greetings: who is pinged at an address where nobody has answered yet."""

from __future__ import annotations

from random import Random

import pytest

from node.greetings import GREET_AGAIN_S_MAX, GREETINGS_AT_ONCE_MAX, GREETINGS_OF_HOST_MAX, Greetings
from protos.ids import PeerId

A = PeerId("a")


@pytest.fixture
def greetings() -> Greetings:
    return Greetings(Random(0))


def test_who_never_answers_is_greeted_ever_more_rarely(greetings: Greetings) -> None:
    times = [now / 2 for now in range(1000) if greetings.due({A: "10.0.0.1:1"}, now / 2)]
    assert times[:7] == [0.0, 1.0, 3.0, 7.0, 15.0, 31.0, 63.0]
    assert times[-1] - times[-2] == GREET_AGAIN_S_MAX


def test_who_moves_or_is_lost_again_is_greeted_at_once(greetings: Greetings) -> None:
    for now in range(100):
        greetings.due({A: "10.0.0.1:1"}, float(now))
    assert not greetings.due({A: "10.0.0.1:1"}, 100.0)
    assert greetings.due({A: "10.0.0.2:1"}, 100.0) == [A]
    assert greetings.due({}, 100.5) == []
    assert greetings.due({A: "10.0.0.2:1"}, 100.5) == [A]


def test_one_host_is_sent_few_in_a_round_however_many_say_that_they_are_there(greetings: Greetings) -> None:
    crowd = {PeerId(f"p{n}"): f"10.6.6.6:{n}" for n in range(1, 100)} | {A: "10.0.0.1:1"}
    assert len(greetings.due(crowd, 0.0)) == GREETINGS_OF_HOST_MAX + 1


def test_a_crowd_is_greeted_round_by_round(greetings: Greetings) -> None:
    crowd = {PeerId(f"p{n}"): f"10.0.0.{n}:1" for n in range(3 * GREETINGS_AT_ONCE_MAX)}
    rounds = [greetings.due(crowd, 0.1 * n) for n in range(3)]
    assert [len(each) for each in rounds] == [GREETINGS_AT_ONCE_MAX] * 3
    assert {peer for each in rounds for peer in each} == crowd.keys()
