"""PeerHealth: deadlines follow a peer's own history; breakers open by what failed, and none for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.health import (
    DEADLINE_FIRST_PAIR_S,
    DEADLINE_FIRST_S,
    DEADLINE_S_MAX,
    DEADLINE_S_MIN,
    HEALTH_PEERS_MAX,
    MISSES_MAX,
    OPEN_FAULTY_S,
    OPEN_S,
    OPEN_S_MAX,
    TRIPS_FORGOTTEN_S,
    PeerHealth,
    Score,
)
from coordinator.view import Health
from protos.errors import (
    BrokenInvariant,
    InvalidFrame,
    NonFinite,
    Overloaded,
    PeerLost,
    ShoalError,
    ShuttingDown,
    Unauthenticated,
)
from protos.ids import PeerId

PEER, OTHER = PeerId("peer"), PeerId("other")
LOST = PeerLost("the connection broke")
NAN = NonFinite("row 0 is NaN")


# Deadlines


def test_before_any_history_a_deadline_is_generous_and_grows_with_the_pairs() -> None:
    assert PeerHealth().deadline_s(PEER, 8) == DEADLINE_FIRST_S + 8 * DEADLINE_FIRST_PAIR_S
    assert PeerHealth().deadline_s(PEER, 2**17) == DEADLINE_S_MAX


def test_a_fast_peer_has_the_least_deadline_and_a_slow_one_its_own() -> None:
    health = PeerHealth()
    for _ in range(100):
        health.succeeded(PEER, 0.002, 8, 0.0)
        health.succeeded(OTHER, 0.4, 8, 0.0)
    assert health.deadline_s(PEER, 8) == DEADLINE_S_MIN
    assert health.deadline_s(OTHER, 8) == pytest.approx(0.4, rel=0.01)


def test_a_call_of_another_size_is_judged_by_the_nearest_smaller_one_in_proportion() -> None:
    health = PeerHealth()
    for _ in range(100):
        health.succeeded(PEER, 0.4, 8, 0.0)
    assert health.deadline_s(PEER, 32) == pytest.approx(1.6, rel=0.01)
    assert health.deadline_s(PEER, 1) == pytest.approx(0.4, rel=0.01)


@given(st.lists(st.floats(0.2, 0.4), min_size=200, max_size=200))
def test_few_calls_of_a_steady_peer_are_late(latencies: list[float]) -> None:
    health, late = PeerHealth(), 0
    for latency_s in latencies:
        late += latency_s > health.deadline_s(PEER, 8)
        health.succeeded(PEER, latency_s, 8, 0.0)
    assert late <= len(latencies) * 0.05


# Breakers


def test_a_lost_connection_opens_at_once_and_any_sign_of_life_closes() -> None:
    for error in (LOST, ShuttingDown("it leaves")):
        health = PeerHealth()
        assert health.failed(PEER, error, 10.0)
        assert health.state(PEER, 10.0) is Health.DEAD
        health.heard(PEER, 10.0)  # said before it was lost
        assert health.state(PEER, 10.0) is Health.DEAD
        health.heard(PEER, 10.1)
        assert health.state(PEER, 10.1) is Health.ALIVE


@pytest.mark.parametrize("error", [Overloaded("full"), Unauthenticated("the token ran out"), None])
def test_the_second_miss_in_a_row_opens_and_the_first_makes_suspect(error: ShoalError | None) -> None:
    health = PeerHealth()
    for miss in range(1, MISSES_MAX + 1):
        opened = health.late(PEER, 0.0) if error is None else health.failed(PEER, error, 0.0)
        assert opened is (miss == MISSES_MAX)
        assert health.state(PEER, 0.0) is (Health.DEAD if opened else Health.SUSPECT)


def test_a_late_peer_is_not_asked_now_and_still_holds_what_it_holds() -> None:
    health = PeerHealth()
    for _ in range(2):
        health.late(PEER, 10.0)
    assert (health.state(PEER, 10.1), health.standing(PEER, 10.1)) == (Health.DEAD, Health.SUSPECT)
    health.failed(PEER, LOST, 20.0)
    assert health.state(PEER, 20.1) == health.standing(PEER, 20.1) == Health.DEAD


def test_an_answer_between_two_misses_forgives_the_first() -> None:
    health = PeerHealth()
    health.late(PEER, 0.0)
    health.succeeded(PEER, 0.1, 8, 0.1)
    assert health.state(PEER, 0.1) is Health.ALIVE
    assert not health.late(PEER, 0.2)


def test_a_late_answer_closes_a_breaker_that_lateness_opened_but_a_word_on_another_lane_does_not() -> None:
    health = PeerHealth()
    assert [health.late(PEER, 0.0), health.late(PEER, 0.0)] == [False, True]
    health.heard(PEER, 0.1)
    assert health.state(PEER, 0.1) is Health.DEAD
    health.succeeded(PEER, 0.5, 8, 0.2)
    assert health.state(PEER, 0.2) is Health.ALIVE


@pytest.mark.parametrize("error", [NAN, InvalidFrame("rows of another shape")])
def test_a_wrong_answer_opens_for_longer_whatever_is_said_meanwhile(error: ShoalError) -> None:
    health = PeerHealth()
    assert health.failed(PEER, error, 0.0)
    health.heard(PEER, 1.0)
    health.succeeded(PEER, 0.1, 8, 1.0)
    assert health.state(PEER, OPEN_FAULTY_S - 0.01) is Health.DEAD
    assert health.state(PEER, OPEN_FAULTY_S) is Health.SUSPECT
    health.succeeded(PEER, 0.1, 8, OPEN_FAULTY_S)
    assert health.state(PEER, OPEN_FAULTY_S) is Health.ALIVE


def test_a_wrong_answer_counts_also_while_the_breaker_is_open_for_weather() -> None:
    health = PeerHealth()
    health.failed(PEER, LOST, 0.0)
    assert not health.failed(PEER, NAN, 0.5)  # open already
    assert health.state(PEER, OPEN_S + 1) is Health.DEAD


def test_what_was_under_way_when_the_breaker_opened_does_not_open_it_again() -> None:
    health = PeerHealth()
    assert health.failed(PEER, LOST, 0.0)
    assert not health.failed(PEER, LOST, 0.01)
    assert not health.late(PEER, 0.02)
    assert health.state(PEER, OPEN_S) is Health.SUSPECT


def test_after_its_time_a_peer_is_suspect_then_on_trial_and_one_more_miss_doubles_the_time() -> None:
    health, now, open_s = PeerHealth(), 0.0, OPEN_FAULTY_S
    for _ in range(6):
        assert health.failed(PEER, NAN, now)
        expected = min(open_s, OPEN_S_MAX)
        assert health.state(PEER, now + expected - 0.01) is Health.DEAD
        assert health.state(PEER, now + expected) is Health.SUSPECT
        assert health.state(PEER, now + 2 * expected) is Health.ALIVE
        now += min(2 * expected, TRIPS_FORGOTTEN_S - 1)
        open_s *= 2


def test_a_failure_long_after_the_last_one_opens_for_the_first_time_again() -> None:
    health = PeerHealth()
    health.failed(PEER, LOST, 0.0)
    health.failed(PEER, LOST, 2.0)
    health.failed(PEER, LOST, 2.0 + TRIPS_FORGOTTEN_S)
    assert health.state(PEER, 2.0 + TRIPS_FORGOTTEN_S + OPEN_S) is Health.SUSPECT


def test_our_own_bugs_are_not_held_against_a_peer() -> None:
    health = PeerHealth()
    assert not health.failed(PEER, BrokenInvariant("ours"), 0.0)
    assert health.score(PEER) == Score()


def test_the_score_tells_what_the_calls_came_to() -> None:
    health = PeerHealth()
    health.succeeded(PEER, 0.25, 8, 0.0)
    health.late(PEER, 0.0)
    health.failed(PEER, NAN, 0.0)
    expected = Score(calls=2, calls_failed=1, calls_late=1, latency_s=0.25, last_error="non_finite: row 0 is NaN")
    assert health.score(PEER) == expected


def test_a_breaker_opens_with_a_loss_and_closes_with_a_word_and_who_is_forgotten_has_no_score() -> None:
    health = PeerHealth()
    for _ in range(9):
        health.succeeded(PEER, 0.1, 8, 0.0)
    assert health.state(PEER, 0.0) is Health.ALIVE
    health.failed(PEER, LOST, 1.0)
    assert health.state(PEER, 1.0) is Health.DEAD
    health.heard(PEER, 2.0)
    assert health.state(PEER, 2.0) is Health.ALIVE
    health.forget(PEER)
    assert health.score(PEER) == Score()


def test_no_more_than_so_many_peers_are_remembered() -> None:
    health = PeerHealth()
    peers = [PeerId(str(number)) for number in range(HEALTH_PEERS_MAX + 1)]
    for peer in peers:
        health.failed(peer, LOST, 0.0)
    assert sum(health.state(peer, 0.0) is Health.DEAD for peer in peers) == HEALTH_PEERS_MAX
    assert health.state(PeerId("0"), 0.0) is Health.ALIVE


calls = st.one_of(
    st.sampled_from(["late", "heard", "succeeded"]),
    st.sampled_from([LOST, NAN, Overloaded("full"), ShuttingDown("it")]),
)


@given(st.lists(st.tuples(calls, st.floats(0, 100)), max_size=40))
def test_no_breaker_is_open_for_ever_and_a_success_after_its_time_closes_it(script: list[tuple[object, float]]) -> None:
    health, now = PeerHealth(), 0.0
    for call, pause_s in script:
        now += pause_s
        if isinstance(call, ShoalError):
            health.failed(PEER, call, now)
        elif call == "succeeded":
            health.succeeded(PEER, 0.1, 8, now)
        else:
            (health.late if call == "late" else health.heard)(PEER, now)
    assert health.state(PEER, now + OPEN_S_MAX) is not Health.DEAD
    assert health.state(PEER, now + 2 * OPEN_S_MAX) is Health.ALIVE
    health.succeeded(PEER, 0.1, 8, now + OPEN_S_MAX)
    assert health.state(PEER, now + OPEN_S_MAX) is Health.ALIVE
