"""What becomes of an answer whose stages or experts are lost (PROTOCOL 8.3, 8.4, 8.6)."""

from dataclasses import replace
from itertools import pairwise

import pytest
from toy_session import (
    DETOUR,
    DOOR,
    FAR,
    FIRST,
    LOST,
    NEAR,
    NO_ROUTE,
    OTHER,
    ROUTE,
    SECOND,
    STEP_DEADLINE_S,
    THIRD,
    arrive,
    fail,
    feeding,
    lose,
    opening,
    planning,
    reopen,
    replanning,
    route,
    waiting,
)

from coordinator.session import (
    REROUTES_MAX,
    RETRY_S_MAX,
    SLOW_STEPS,
    STEP_DEADLINE_S_MIN,
    CloseStages,
    DeadlinePassed,
    Effect,
    Fail,
    Opened,
    OpenStages,
    Plan,
    Routed,
    SendStep,
    Session,
    State,
    StepFailed,
    Tell,
    TokenArrived,
    is_held_against,
)
from protos.errors import (
    BrokenInvariant,
    ContextTooLong,
    DeadlineExceeded,
    ExpertsUnreachable,
    Fenced,
    Gap,
    InvalidRequest,
    NonFinite,
    Overloaded,
    PeerLost,
    PermissionDenied,
    RemoteError,
    ShoalError,
    Unauthenticated,
    UnitMissing,
    UnknownSession,
    WrongModel,
    WrongPeer,
)
from protos.ids import PeerId

GONE = ExpertsUnreachable("no replica of expert.3.7 answers")
FULL = Overloaded("no room for the KV", retry_after_s=1.0)


def tick(session: Session, *suspects: PeerId) -> list[Effect]:
    """Lets the session's own deadline come."""
    assert session.deadline is not None
    return session.handle(DeadlinePassed(frozenset(suspects)), session.deadline)


def avoided(effects: list[Effect]) -> frozenset[PeerId]:
    return next(effect.avoid for effect in effects if isinstance(effect, Plan))


def told(effects: list[Effect]) -> list[Tell]:
    return [effect for effect in effects if isinstance(effect, Tell)]


def failure(effects: list[Effect]) -> ShoalError:
    assert isinstance(effects[-1], Fail)
    return effects[-1].error


# 8.4: a lost stage is replaced


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_lost_stage_is_replaced_and_the_whole_log_fed_to_the_new_one(tokens: int) -> None:
    session = feeding()
    for token in range(tokens):
        arrive(session, token + 10)
    message = f"{LOST[FAR].message}; looking for another way"
    assert lose(session, FAR) == [Tell("peer_lost", message, FAR), Plan(frozenset({FAR}))]
    assert session.handle(Routed(DETOUR), 0.0) == [OpenStages(SECOND, DETOUR, 11)]
    held = 3 + tokens
    [fed] = session.handle(Opened(SECOND, (held, held, 0)), 0.0)
    assert fed == SendStep(SECOND, 0, tuple(session.log), held)
    assert arrive(session)[0] == SendStep(SECOND, held, (7,), held + 1)


def test_a_stage_lost_during_opening_is_replaced() -> None:
    session = opening()
    assert avoided(lose(session, NEAR)) == {NEAR}
    assert reopen(session, route(DOOR, OTHER, FAR), (0, 0, 0)) == [SendStep(SECOND, 0, (1, 2, 3), 3)]


def test_two_losses_in_a_row_avoid_both() -> None:
    session = feeding()
    lose(session, FAR)
    session.handle(Routed(DETOUR), 0.0)
    assert avoided(lose(session, OTHER)) == {FAR, OTHER}
    assert session.handle(Routed(route(DOOR)), 0.0)[0] == OpenStages(THIRD, route(DOOR), 11)


def test_what_several_stages_tell_of_one_failure_counts_once() -> None:
    session = feeding(reroutes_max=1)
    lose(session, FAR)
    assert lose(session, FAR) == lose(session, NEAR) == []
    assert session.state is State.PLANNING
    assert reopen(session, DETOUR, (0, 0, 0)) == [SendStep(SECOND, 0, (1, 2, 3), 3)]
    assert session.handle(StepFailed(FIRST, LOST[NEAR], 1, NEAR), 0.0) == []
    assert session.handle(TokenArrived(FIRST, 3, 7), 0.0) == []
    assert session.state is State.FEEDING


@pytest.mark.parametrize("session", [replanning(), waiting()])
def test_what_a_lost_route_still_answers_is_dropped(session: Session) -> None:
    state = session.state
    for event in (Opened(FIRST, (3, 3, 3)), TokenArrived(FIRST, 3, 7), StepFailed(FIRST, LOST[NEAR], 1, NEAR)):
        assert session.handle(event, 0.0) == []
    assert (session.state, session.generated) == (state, 0)


def test_an_answer_changes_its_route_only_so_often() -> None:
    session = feeding(max_tokens=50)
    for _ in range(REROUTES_MAX):
        lose(session, FAR)
        reopen(session, ROUTE, (0, 0, 0))
        arrive(session)
    effects = lose(session, FAR)
    assert effects == [CloseStages(session.epoch), Fail(LOST[FAR])]


@pytest.mark.parametrize("error", [BrokenInvariant("ours"), PeerLost("ours"), UnknownSession("ours")])
def test_a_failure_of_the_door_s_own_stage_is_not_routed_around(error: ShoalError) -> None:
    assert failure(fail(feeding(), error, DOOR)) is error


def test_a_bug_found_at_a_stage_ends_the_answer() -> None:
    assert isinstance(failure(fail(feeding(), BrokenInvariant("ours"), FAR)), BrokenInvariant)


def test_a_fence_ends_the_answer() -> None:
    error = Fenced("another door has taken over")
    assert failure(fail(feeding(), error, FAR)) is error


# Nobody else holds it


def test_without_another_holder_the_answer_waits_and_tries_again_also_the_one_that_failed() -> None:
    session = feeding()
    arrive(session)
    lose(session, FAR)
    effects = fail(session, NO_ROUTE)
    assert effects == [Tell("peer_lost", f"{LOST[FAR].message}; waiting up to 30 s for it", None)]
    assert session.state is State.WAITING
    assert tick(session) == [Plan(frozenset())]
    assert fail(session, NO_ROUTE, now=1.0) == []
    assert tick(session) == [Plan(frozenset())]
    assert reopen(session, ROUTE, (4, 4, 0), 2.0) == [SendStep(SECOND, 0, (1, 2, 3, 7), 4)]
    assert arrive(session, 8, 3.0)[0] == SendStep(SECOND, 4, (8,), 5)


def test_the_looks_for_another_holder_grow_rarer_and_end_with_the_error_of_the_lost_peer() -> None:
    session = feeding(repair_wait_s=30.0)
    lose(session, FAR)
    fail(session, NO_ROUTE)
    looks, effects = [0.0], []
    while not session.ended:
        assert session.deadline is not None
        looks.append(session.deadline)
        assert tick(session) == [Plan(frozenset())]
        effects = fail(session, NO_ROUTE, now=looks[-1])
    assert failure(effects) is LOST[FAR]
    assert looks[-1] == 30.0
    gaps = [later - before for before, later in pairwise(looks)]
    assert gaps[:-1] == sorted(gaps[:-1])
    assert max(gaps) == RETRY_S_MAX
    assert len(looks) < 15


def test_a_peer_that_comes_back_and_is_lost_again_is_told_once_and_has_no_more_time() -> None:
    session = feeding(reroutes_max=1)
    lose(session, FAR)
    fail(session, NO_ROUTE)
    while not session.ended:
        assert session.deadline is not None
        now = session.deadline
        assert tick(session)
        if session.state is State.PLANNING:
            session.handle(Routed(ROUTE), now)
            effects = lose(session, FAR, now)
            assert not told(effects)
    assert failure(effects) is LOST[FAR]
    assert now == 30.0


def test_after_an_answer_went_on_the_next_loss_has_its_own_time() -> None:
    session = feeding()
    lose(session, FAR)
    fail(session, NO_ROUTE)
    tick(session)
    reopen(session, ROUTE, (0, 0, 0), 29.0)
    arrive(session, 7, 29.0)
    lose(session, FAR, 29.0)
    assert told(fail(session, NO_ROUTE, now=29.0))
    assert session.state is State.WAITING


def test_a_peer_that_answered_wrongly_is_not_taken_again_even_if_nobody_else_is_left() -> None:
    session = feeding()
    error = NonFinite("far: row 0 is NaN")
    assert avoided(fail(session, error, FAR)) == {FAR}
    fail(session, NO_ROUTE)
    while not session.ended:
        now = session.deadline
        assert tick(session) == [Plan(frozenset({FAR}))]
        effects = fail(session, NO_ROUTE, now=now)
    assert failure(effects) is error


def test_a_peer_that_started_again_has_lost_the_session_and_may_be_used() -> None:
    session = feeding()
    fail(session, UnknownSession("not open here"), FAR)
    fail(session, NO_ROUTE)
    assert tick(session) == [Plan(frozenset())]


def test_no_route_at_all_is_refused_at_once() -> None:
    session = planning()
    assert fail(session, NO_ROUTE) == [Fail(NO_ROUTE)]


def test_a_bug_in_planning_ends_an_answer_that_waits() -> None:
    session = replanning()
    assert isinstance(failure(fail(session, BrokenInvariant("ours"))), BrokenInvariant)


# 8.3: experts that nobody answers


def test_experts_that_are_unreachable_are_waited_for_on_the_same_route_and_told_once() -> None:
    session = feeding()
    arrive(session)
    effects = fail(session, GONE, FAR)
    assert effects == [Tell("experts_unreachable", f"{GONE.message}; waiting up to 30 s for it", FAR)]
    assert tick(session) == [SendStep(FIRST, 3, (7,), 4)]
    assert fail(session, GONE, FAR, now=1.0) == []
    assert tick(session) == [SendStep(FIRST, 3, (7,), 4)]
    assert arrive(session, 8)[0] == SendStep(FIRST, 4, (8,), 5)
    assert told(fail(session, GONE, FAR))


@pytest.mark.parametrize("peer", [DOOR, FAR])
def test_experts_that_do_not_come_back_end_the_answer_with_their_error(peer: PeerId) -> None:
    session = feeding(repair_wait_s=2.0)
    effects = fail(session, GONE, peer)
    while not session.ended:
        now = session.deadline
        assert tick(session) == [SendStep(FIRST, 0, (1, 2, 3), 3)]
        effects = fail(session, GONE, peer, now=now)
    assert failure(effects) is GONE
    assert now == 2.0


def test_a_stage_that_is_lost_while_experts_are_waited_for_is_replaced() -> None:
    session = feeding()
    fail(session, GONE, FAR)
    tick(session)
    lose(session, FAR, 0.5)
    assert avoided(tick(session)) == {FAR}
    assert reopen(session, DETOUR, (3, 3, 0), 1.0) == [SendStep(SECOND, 0, (1, 2, 3), 3)]


# 8.1: overloaded at opening


@pytest.mark.parametrize("peer", [FAR, DOOR])
def test_a_stage_without_room_is_replaced_also_the_door_s_own(peer: PeerId) -> None:
    session = opening()
    assert avoided(fail(session, FULL, peer)) == {peer}
    assert session.handle(Routed(DETOUR), 0.0) == [OpenStages(SECOND, DETOUR, 11)]


@pytest.mark.parametrize("peer", [FAR, DOOR])
def test_an_answer_that_nobody_has_room_for_is_refused_at_once(peer: PeerId) -> None:
    session = opening()
    fail(session, FULL, peer)
    assert fail(session, NO_ROUTE) == [CloseStages(FIRST), Fail(FULL)]


def test_an_answer_under_way_waits_for_room() -> None:
    session = feeding()
    arrive(session)
    session.handle(Routed(DETOUR), 0.0)
    fail(session, FULL, OTHER)
    assert told(fail(session, NO_ROUTE))[0].code == "overloaded"
    assert session.state is State.WAITING


# Deadlines


def slow_until(session: Session, step_s: float) -> float:
    """A route's steps of so many seconds; the end of the last of them."""
    now = 0.0
    for _ in range(4):
        now += step_s
        arrive(session, 7, now)
    return now


def test_a_step_is_asked_after_when_it_takes_much_longer_than_the_last_ones() -> None:
    session = feeding()
    now = slow_until(session, 0.01)
    assert session.deadline == now + STEP_DEADLINE_S_MIN
    slower = feeding()
    now = slow_until(slower, 0.4)
    assert slower.deadline == pytest.approx(now + SLOW_STEPS * 0.4)
    slowest = feeding()
    now = slow_until(slowest, 2.0)
    assert slowest.deadline == now + STEP_DEADLINE_S


def test_where_stages_ask_for_experts_a_step_may_wait_for_these() -> None:
    session = planning()
    session.handle(Routed(replace(ROUTE, fans_out=True)), 0.0)
    session.handle(Opened(FIRST, (0, 0, 0)), 0.0)
    now = slow_until(session, 0.01)
    assert session.deadline == now + min(STEP_DEADLINE_S_MIN + 10.0, STEP_DEADLINE_S)


def test_the_first_step_of_another_route_has_the_whole_deadline_again_be_it_one_row() -> None:
    session = feeding()
    now = slow_until(session, 0.01)
    [fed] = reopen(session, DETOUR, (6, 6, 6), now)
    assert isinstance(fed, SendStep)
    assert len(fed.tokens) == 1
    assert session.deadline == now + STEP_DEADLINE_S


@pytest.mark.parametrize("make", [opening, feeding])
def test_a_late_step_is_routed_around_those_who_are_to_blame(make: object) -> None:
    session = make()  # type: ignore[operator]
    effects = tick(session, FAR, OTHER)
    assert told(effects)[0].code == "deadline_exceeded"
    assert FAR in told(effects)[0].message
    assert avoided(effects) == {FAR, OTHER}


def test_a_late_step_that_nobody_is_to_blame_for_has_the_whole_deadline_and_then_fails() -> None:
    session = feeding()
    now = slow_until(session, 0.01)
    assert tick(session) == []
    assert session.deadline == now + STEP_DEADLINE_S
    assert isinstance(failure(tick(session)), DeadlineExceeded)


def test_a_step_that_comes_after_all_is_taken() -> None:
    session = feeding()
    slow_until(session, 0.01)
    tick(session)
    length = len(session.log)
    assert arrive(session, 7, 9.0)[0] == SendStep(FIRST, length, (7,), length + 1)


def test_a_late_plan_blames_nobody() -> None:
    session = replanning()
    assert isinstance(failure(tick(session, FAR)), DeadlineExceeded)


def test_the_error_of_a_wait_names_the_first_loss() -> None:
    session = feeding()
    lose(session, FAR)
    session.handle(Routed(DETOUR), 0.0)
    lose(session, OTHER)
    fail(session, UnitMissing("none"))
    while not session.ended:
        now = session.deadline
        tick(session)
        effects = fail(session, UnitMissing("none"), now=now)
    assert failure(effects) is LOST[FAR]


@pytest.mark.parametrize(
    ("error", "at_opening", "in_steps"),
    [
        (RemoteError("the stage's own bug"), True, True),
        (NonFinite("NaN"), True, True),
        (PeerLost("gone"), True, True),
        (WrongModel("another one"), True, True),
        (Overloaded("no room"), False, True),
        (InvalidRequest("more positions than this stage ever has"), False, True),
        (ContextTooLong("too long"), False, True),
        (PermissionDenied("exchange records first"), False, True),
        (UnknownSession("started again"), False, False),
        (Unauthenticated("started again"), False, False),
        (WrongPeer("started again"), False, False),
        (Fenced("another door"), False, False),
        (Gap(held=3), False, False),
        (BrokenInvariant("a bug here"), False, False),
    ],
    ids=lambda given: getattr(given, "code", None),
)
def test_what_is_the_stage_s_fault_is_held_against_its_peer_and_what_is_the_answer_s_is_not(
    error: ShoalError, at_opening: bool, in_steps: bool
) -> None:
    assert is_held_against(error, opening=True) is at_opening
    assert is_held_against(error, opening=False) is in_steps
