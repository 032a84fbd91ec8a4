"""Admission: bounded, first come first served, and a refusal says when to come back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.admission import RETRY_AFTER_S_MAX, Admission, Admit, Asked, Left, Refuse, Tick
from protos.errors import IllegalTransition, Overloaded
from protos.ids import SessionId

A, B, C, D = (SessionId(name) for name in "abcd")


def full() -> Admission:
    """One runs (a), one waits (b)."""
    admission = Admission(1, 1, queue_wait_s_max=30.0)
    admission.handle(Asked(A), 0.0)
    admission.handle(Asked(B), 1.0)
    return admission


def test_a_free_place_is_given_at_once() -> None:
    assert Admission(1, 0).handle(Asked(A), 0.0) == [Admit(A)]


def test_whoever_finds_no_place_waits_for_the_first_to_leave() -> None:
    admission = full()
    assert (admission.running, admission.waiting) == (1, 1)
    assert admission.handle(Left(A), 2.0) == [Admit(B)]
    assert admission.handle(Left(B), 3.0) == []
    assert (admission.running, admission.waiting) == (0, 0)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    (refusal,) = full().handle(Asked(C), 2.0)
    assert isinstance(refusal, Refuse)
    assert isinstance(refusal.error, Overloaded)
    assert refusal.error.retry_after_s == 2.0
    assert "1 sessions run and 1 wait; try again in 2 s" in refusal.error.message


def test_the_retry_after_grows_with_the_sessions_seen_and_has_a_limit() -> None:
    admission = full()
    admission.handle(Left(A), 10.0)
    admission.handle(Asked(A), 10.0)
    (refusal,) = admission.handle(Asked(C), 10.0)
    assert isinstance(refusal, Refuse)
    assert refusal.error.retry_after_s == 20.0
    admission.handle(Left(B), 10_000.0)
    admission.handle(Asked(B), 10_000.0)
    (refusal,) = admission.handle(Asked(C), 10_000.0)
    assert isinstance(refusal, Refuse)
    assert refusal.error.retry_after_s == RETRY_AFTER_S_MAX


def test_nobody_waits_longer_than_the_limit() -> None:
    admission = full()
    assert admission.deadline == 31.0
    assert admission.handle(Tick(), 30.9) == []
    (refusal,) = admission.handle(Tick(), 31.0)
    assert isinstance(refusal, Refuse)
    assert refusal.session == B
    assert "no turn came within 30 s" in str(refusal.error)
    assert admission.deadline is None


def test_a_client_that_gives_up_while_it_waits_frees_its_place_in_the_queue() -> None:
    admission = full()
    assert admission.handle(Left(B), 2.0) == []
    assert admission.handle(Asked(C), 2.0) == []
    assert admission.handle(Left(A), 3.0) == [Admit(C)]


@pytest.mark.parametrize("event", [Asked(A), Asked(B), Left(C)])
def test_an_illegal_event_raises_and_changes_nothing(event: Asked | Left) -> None:
    admission = full()
    with pytest.raises(IllegalTransition):
        admission.handle(event, 2.0)
    assert (admission.running, admission.waiting, admission.deadline) == (1, 1, 31.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("+-"), st.sampled_from([A, B, C, D])), max_size=40))
def test_limits_hold_and_everyone_who_asked_is_answered_in_order(script: list[tuple[str, SessionId]]) -> None:
    admission, inside, queue = Admission(2, 1), set[SessionId](), list[SessionId]()
    for now, (sign, session) in enumerate(script):
        known = session in inside or session in queue
        if (sign == "+") == known:
            continue
        effects = admission.handle(Asked(session) if sign == "+" else Left(session), float(now))
        if sign == "-":
            inside.discard(session)
            queue = [waiting for waiting in queue if waiting != session]
        for effect in effects:
            if isinstance(effect, Admit):
                assert effect.session == (queue.pop(0) if queue else session)
                inside.add(effect.session)
        if sign == "+" and not effects:
            queue.append(session)
        assert admission.running == len(inside) <= 2
        assert admission.waiting == len(queue) <= 1
