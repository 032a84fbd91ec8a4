"""The session's laws, one test each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_session import DOOR, FIRST, ROUTE, SECOND, arrive, fail, feeding, opening, planning

from coordinator.session import (
    DEADLINE_ROWS,
    Cancelled,
    CloseStages,
    DeadlinePassed,
    Emit,
    Epoch,
    Event,
    Fail,
    Finish,
    Opened,
    OpenStages,
    Routed,
    SendStep,
    Session,
    State,
    StepFailed,
    StopStringFound,
    TokenArrived,
    rewind,
)
from protos.errors import (
    ContextTooLong,
    DeadlineExceeded,
    Gap,
    IllegalTransition,
    NonFinite,
    UnitMissing,
)
from protos.sampling import SamplingParams


def test_an_answer_goes_from_its_plan_through_its_tokens_to_its_end() -> None:
    session = planning(max_tokens=2)
    assert session.handle(Routed(ROUTE), 0.0) == [OpenStages(FIRST, ROUTE, 5)]
    assert session.handle(Opened(FIRST, (0, 0, 0)), 0.0) == [SendStep(FIRST, 0, (1, 2, 3), 3)]
    assert arrive(session, 7) == [SendStep(FIRST, 3, (7,), 4), Emit(7, 3, None, (), None)]
    assert arrive(session, 8) == [Emit(8, 4, None, (), None), CloseStages(FIRST), Finish("length")]
    assert session.log == [1, 2, 3, 7, 8]
    assert session.generated == 2
    assert session.ended
    assert session.deadline is None


def test_the_next_step_is_sent_before_the_token_is_emitted() -> None:
    assert [type(effect) for effect in arrive(feeding())] == [SendStep, Emit]


def test_a_stop_token_is_emitted_and_ends_the_answer() -> None:
    assert arrive(feeding(), 99) == [Emit(99, 3, None, (), None), CloseStages(FIRST), Finish("stop")]


def test_a_stop_string_ends_the_answer_and_the_step_in_flight_is_dropped() -> None:
    session = feeding()
    arrive(session)
    assert session.handle(StopStringFound(), 0.0) == [CloseStages(FIRST), Finish("stop_string")]
    assert arrive(session) == []
    assert session.generated == 1


def test_an_answer_never_exceeds_the_context() -> None:
    session = feeding(max_tokens=50, context=5)
    arrive(session)
    assert arrive(session)[-1] == Finish("length")
    assert len(session.log) == 5


@pytest.mark.parametrize("prompt", [(), (1,) * 5, (1,) * 6])
def test_a_prompt_that_leaves_no_room_for_a_token_is_refused(prompt: tuple[int, ...]) -> None:
    with pytest.raises(ContextTooLong, match="between 1 and 4 tokens"):
        Session(prompt, SamplingParams(), door=DOOR, context=5)


def test_logprobs_reach_the_client_unchanged() -> None:
    event = TokenArrived(FIRST, 3, 7, -0.5, ((7, -0.5), (8, -1.0)), (-2.0, -3.0))
    assert feeding().handle(event, 0.0)[1] == Emit(7, 3, -0.5, ((7, -0.5), (8, -1.0)), (-2.0, -3.0))


# Rewind law


def test_rewind_goes_to_what_all_hold_and_feeds_at_least_the_last_token() -> None:
    assert rewind(10, [10, 9]) == 9
    assert rewind(10, [4, 9]) == 4
    assert rewind(10, []) == 9


@given(st.integers(1, 50), st.lists(st.integers(0, 60)))
def test_rewind_never_starts_beyond_what_a_stage_holds(length: int, held: list[int]) -> None:
    p = rewind(length, held)
    assert 0 <= p < length
    assert all(p <= positions for positions in held)


def test_another_route_raises_the_epoch_and_feeds_from_what_all_stages_hold() -> None:
    session = feeding()
    arrive(session, 7)
    assert session.handle(Routed(ROUTE), 0.0) == [OpenStages(SECOND, ROUTE, 11)]
    assert session.handle(Opened(SECOND, (2, 4)), 0.0) == [SendStep(SECOND, 2, (3, 7), 4)]


def test_what_carries_a_lower_epoch_is_dropped() -> None:
    session = feeding()
    session.handle(Routed(ROUTE), 0.0)
    for event in (TokenArrived(FIRST, 3, 7), Opened(FIRST, (0,)), StepFailed(FIRST, NonFinite("NaN"))):
        assert session.handle(event, 0.0) == []
    assert session.state is State.OPENING
    assert session.generated == 0


@pytest.mark.parametrize("event", [TokenArrived(Epoch(2, DOOR), 3, 7), StepFailed(Epoch(2, DOOR), NonFinite("NaN"))])
def test_a_higher_epoch_than_the_door_raised_is_illegal(event: Event) -> None:
    with pytest.raises(IllegalTransition, match="only the door of"):
        feeding().handle(event, 0.0)


def test_a_second_answer_to_the_same_step_is_dropped() -> None:
    session = feeding()
    arrive(session, 7)
    assert session.handle(TokenArrived(FIRST, 3, 8), 0.0) == []
    assert session.log[-1] == 7


def test_a_token_beyond_the_log_or_before_the_stages_opened_is_illegal() -> None:
    with pytest.raises(IllegalTransition, match="position 4"):
        feeding().handle(TokenArrived(FIRST, 4, 7), 0.0)
    with pytest.raises(IllegalTransition, match="opening"):
        opening().handle(TokenArrived(FIRST, 3, 7), 0.0)


def test_a_gap_is_fed_again_from_what_is_held() -> None:
    session = feeding()
    arrive(session, 7)
    assert session.handle(StepFailed(FIRST, Gap(held=1)), 0.0) == [SendStep(FIRST, 1, (2, 3, 7), 4)]
    assert session.handle(StepFailed(FIRST, Gap(held=0)), 0.0) == [SendStep(FIRST, 0, (1, 2, 3, 7), 4)]
    assert arrive(session, 8)[0] == SendStep(FIRST, 4, (8,), 5)


@pytest.mark.parametrize("held", [3, 4])
def test_a_gap_that_is_none_fails_the_answer_so_that_resends_end(held: int) -> None:
    session = feeding()
    arrive(session, 7)
    error = Gap(held=held)
    assert session.handle(StepFailed(FIRST, error), 0.0) == [CloseStages(FIRST), Fail(error)]


# Position-dependent RoPE


def test_the_first_step_beyond_recompute_at_starts_at_zero_and_the_next_does_not() -> None:
    session = feeding(recompute_at=4)
    assert arrive(session, 7)[0] == SendStep(FIRST, 3, (7,), 4)
    assert arrive(session, 8)[0] == SendStep(FIRST, 0, (1, 2, 3, 7, 8), 5)
    assert arrive(session, 9)[0] == SendStep(FIRST, 5, (9,), 6)


def test_a_prompt_beyond_recompute_at_is_computed_once() -> None:
    session = feeding(recompute_at=2)
    assert arrive(session, 7)[0] == SendStep(FIRST, 3, (7,), 4)


def test_a_stage_lost_while_everything_is_recomputed_does_not_bring_old_positions_back() -> None:
    session = feeding(recompute_at=3)
    assert arrive(session, 7)[0] == SendStep(FIRST, 0, (1, 2, 3, 7), 4)
    session.handle(Routed(ROUTE), 0.0)
    assert session.handle(Opened(SECOND, (3,)), 0.0) == [SendStep(SECOND, 0, (1, 2, 3, 7), 4)]


# Ends


def test_an_error_of_the_door_s_own_stage_ends_the_answer_and_frees_its_stages() -> None:
    error = NonFinite("row 0 is NaN")
    for session in (opening(), feeding()):
        assert fail(session, error, DOOR) == [CloseStages(FIRST), Fail(error)]
        assert session.state is State.FAILED


def test_a_session_without_a_route_has_nothing_to_close() -> None:
    error = UnitMissing("no live peer holds trunk.1")
    assert planning().handle(StepFailed(Epoch(0, DOOR), error), 0.0) == [Fail(error)]
    assert planning().handle(Cancelled(), 0.0) == [Finish("cancelled")]


@pytest.mark.parametrize(
    ("session", "waited_for"), [(planning(), "a route"), (opening(), "its stages"), (feeding(), "a step")]
)
def test_a_passed_deadline_fails_the_answer_and_says_what_it_waited_for(session: Session, waited_for: str) -> None:
    effect = session.handle(DeadlinePassed(), 10.0)[-1]
    assert isinstance(effect, Fail)
    assert isinstance(effect.error, DeadlineExceeded)
    assert f"longer for {waited_for}" in effect.error.message


def test_each_step_has_its_own_deadline_and_a_long_prompt_a_longer_one() -> None:
    session = opening()
    assert session.deadline == 10.0
    session.handle(Opened(FIRST, (0,)), 5.0)
    assert session.deadline == 15.0
    long = Session((1,) * (DEADLINE_ROWS + 1), SamplingParams(), door=DOOR, context=999, step_deadline_s=10.0)
    long.handle(Routed(ROUTE), 0.0)
    long.handle(Opened(FIRST, (0,)), 0.0)
    assert long.deadline == 20.0
