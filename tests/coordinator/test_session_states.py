"""Laws over all of a session's states, with whatever may happen."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_session import DETOUR, FAR, FIRST, IN_STATE, LOST, NO_ROUTE, ROUTE, planning, route

from coordinator.session import (
    TRANSITIONS,
    Cancelled,
    DeadlinePassed,
    Effect,
    Event,
    Fail,
    Finish,
    Opened,
    OpenStages,
    Plan,
    Routed,
    SendStep,
    Session,
    State,
    StepFailed,
    StopStringFound,
    TokenArrived,
)
from protos.errors import ExpertsUnreachable, Gap, IllegalTransition, NonFinite
from protos.ids import PeerId

EVENTS: list[Event] = [
    Routed(ROUTE),
    Opened(FIRST, (0,)),
    TokenArrived(FIRST, 3, 7),
    StepFailed(FIRST, NonFinite("NaN")),
    StopStringFound(),
    DeadlinePassed(),
    Cancelled(),
]


def snapshot(session: Session) -> str:
    return repr(vars(session))


def test_every_state_has_its_test_session() -> None:
    assert {state: make().state for state, make in IN_STATE.items()} == {state: state for state in State}


@pytest.mark.parametrize("state", State)
def test_an_illegal_transition_raises_and_changes_nothing(state: State) -> None:
    for event in EVENTS:
        if type(event) in TRANSITIONS[state]:
            continue
        session = IN_STATE[state]()
        before = snapshot(session)
        with pytest.raises(IllegalTransition, match=f"cannot happen to a session that is {state.value}"):
            session.handle(event, 0.0)
        assert snapshot(session) == before


@pytest.mark.parametrize("state", [State.DONE, State.FAILED])
def test_what_was_under_way_when_the_answer_ended_has_no_effect(state: State) -> None:
    for event in EVENTS:
        if type(event) in TRANSITIONS[state]:
            assert IN_STATE[state]().handle(event, 0.0) == []


def made(entry: Event | str, session: Session) -> Event:
    """Names stand for events of the session's present epoch."""
    now = {
        "token": TokenArrived(session.epoch, len(session.log), 7),
        "gap": StepFailed(session.epoch, Gap(held=0), 0, FAR),
        "open": Opened(session.epoch, (2,)),
        "lost": StepFailed(session.epoch, LOST[FAR], 2, FAR),
        "wrong": StepFailed(session.epoch, NonFinite("NaN"), 2, FAR),
        "experts": StepFailed(session.epoch, ExpertsUnreachable("none"), 2, FAR),
        "no route": StepFailed(session.epoch, NO_ROUTE),
        "detour": Routed(DETOUR),
        "late": DeadlinePassed(frozenset({FAR})),
    }
    return now[entry] if isinstance(entry, str) else entry


NAMES = ["token", "gap", "open", "lost", "wrong", "experts", "no route", "detour", "late"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*EVENTS, *NAMES]), st.floats(0, 20)), max_size=40))
def test_whatever_happens_a_closed_session_stays_closed_one_end_is_told_and_nothing_waits_for_ever(
    script: list[tuple[Event | str, float]],
) -> None:
    session = planning(max_tokens=6, recompute_at=4)
    effects: list[Effect] = []
    now = 0.0
    for entry, pause_s in script:
        now += pause_s
        event = made(entry, session)
        before = snapshot(session)
        try:
            effects += session.handle(event, now)
        except IllegalTransition:
            assert snapshot(session) == before
        assert session.state is State.PLANNING or session.ended == (session.deadline is None)
    for _ in range(40):  # left alone, it ends
        if not session.ended:
            now = max(now, session.deadline or 0.0)
            effects += session.handle(DeadlinePassed(), now)
    assert session.ended
    assert sum(isinstance(effect, Finish | Fail) for effect in effects) == 1
    for effect in effects:
        if isinstance(effect, SendStep):
            assert 0 <= effect.start < effect.until == effect.start + len(effect.tokens) < 9


class _Swarm:
    """Stages that keep a log each; the last one's tokens depend on all of it.  Whoever is lost starts again empty."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.logs: dict[PeerId, list[int]] = {}
        self.peers: list[PeerId] = []

    def answer(self, effect: Effect, session: Session) -> Event | None:
        match effect:
            case Plan() if self.random.random() < 0.3:
                return StepFailed(session.epoch, NO_ROUTE)
            case Plan():
                spare = [peer for peer in map(PeerId, "abcdefghijkl") if peer not in effect.avoid]
                return Routed(route(*self.random.sample(spare, 3)))
            case OpenStages():
                self.peers = [stage.peer for stage in effect.route.stages]
                return self._lose(session, 0.2) or Opened(
                    session.epoch, tuple(len(self.logs.setdefault(peer, [])) for peer in self.peers)
                )
            case SendStep():
                return self._lose(session, 0.2) or self._compute(effect)
            case _:
                return None

    def _lose(self, session: Session, chance: float) -> Event | None:
        if self.random.random() >= chance:
            return None
        peer = self.random.choice(self.peers)
        self.logs[peer] = []
        kind = self.random.random()
        if kind < 0.2:
            is_fed = session.state is State.FEEDING
            return StepFailed(session.epoch, ExpertsUnreachable("none"), 0, peer) if is_fed else None
        return DeadlinePassed(frozenset({peer})) if kind < 0.5 else StepFailed(session.epoch, LOST[FAR], 0, peer)

    def _compute(self, step: SendStep) -> Event:
        for peer in self.peers:
            log = self.logs[peer]
            if len(log) < step.start:
                return StepFailed(step.epoch, Gap(held=len(log)), 0, peer)
            log[step.start :] = step.tokens
        return TokenArrived(step.epoch, step.until, next_token(self.logs[self.peers[-1]]))


def next_token(log: list[int]) -> int:
    return random.Random(repr(log)).randrange(90)


def undisturbed(tokens: int) -> list[int]:
    log = [1, 2, 3]
    for _ in range(tokens):
        log.append(next_token(log))
    return log


@pytest.mark.parametrize("seed", range(60))
def test_whoever_is_lost_an_answer_has_the_tokens_that_it_has_undisturbed_or_fails(seed: int) -> None:
    swarm, session, now = _Swarm(seed), planning(max_tokens=12, reroutes_max=40), 0.0
    event: Event | None = Routed(route(*map(PeerId, "abc")))
    while not session.ended:
        if event is None:
            assert session.deadline is not None
            now = max(now, session.deadline)
            event = DeadlinePassed()
        effects = session.handle(event, now)
        answers = [swarm.answer(effect, session) for effect in effects]
        event = next((answer for answer in answers if answer is not None), None)
        now += 0.05
    assert session.log == undisturbed(session.generated)
    assert session.state is State.FAILED or session.generated == 12
