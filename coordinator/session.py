"""Session: one answer, from its plan to its last token (token log, epoch, states as a table).

Pure: `handle(event, now) -> list[Effect]`; an illegal transition raises IllegalTransition and changes nothing.

Laws, in the order in which a token meets them:
- One step is in flight at a time.  A reply counts only if it carries the session's epoch and ends at the log's length;
  whatever carries a lower epoch, or answers a step that was overtaken, is dropped.
- The next step is sent BEFORE the token is emitted (effects are in order of execution), so that the stages compute
  while the door writes text.  A stop string that the door finds then costs one row, whose reply is dropped.
- Rewind law: what every stage still holds need not be computed again, and at least the last token must be fed:
  p = min(len(log) - 1, positions held by all).
- A peer that fails is avoided from then on, the client is told, and another route is planned, whose epoch is higher.
  Where none is left the answer waits, with growing gaps, until `repair_wait_s` is over: machines come back, also the
  one that failed, unless it answered wrongly.  Experts that nobody answers are waited for in the same way, on the same
  route.  What was lost is told to the client as it was told first.
- An answer that no stage has room for at its beginning is refused at once; one that was under way waits.
- Nobody is rerouted around a fence: a fenced door ends its session.
- Position-dependent RoPE: KV computed while the log had at most `recompute_at` tokens is wrong for a longer log, so the
  first step beyond it starts at 0 (p = 0), as transformers' generate drops its cache there.
"""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from protos.epoch import Epoch
from protos.errors import (
    ContextTooLong,
    DeadlineExceeded,
    ExpertsUnreachable,
    Fenced,
    Gap,
    IllegalTransition,
    InvalidRequest,
    LocalError,
    Overloaded,
    PermissionDenied,
    RemoteError,
    ShoalError,
    Unauthenticated,
    UnknownSession,
    WrongPeer,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.route import Route
    from protos.ids import PeerId
    from protos.sampling import SamplingParams

FinishReason = Literal["stop", "length", "stop_string", "cancelled"]

# A step may take `step_deadline_s` for each so many rows or part of it: a long prompt is slow, not lost.
DEADLINE_ROWS = 256
# A step whose route has other nodes is asked after when it takes so many times as long as the slowest of the last ones,
# and at least so many seconds: other work on a busy machine is no failure.  Where stages ask other nodes for experts, a
# step may also wait `expert_wait_s` for these: its stage is not stuck, and will say so itself.
SLOW_STEPS = 20.0
STEP_DEADLINE_S_MIN = 5.0
RECENT_STEPS = 16
# How often one answer may change its route.
REROUTES_MAX = 8
# Between two looks for what is missing: at first, and at most.
RETRY_S_MIN = 0.25
RETRY_S_MAX = 4.0

# Remote errors that a node gives which started again: it may well be used, from position 0.
_STARTED_AGAIN = (UnknownSession, Unauthenticated, WrongPeer)
# What says nothing of the stage that gives it, beside these: another door or epoch is ahead, or the bug is here.
_NO_FAULT = (*_STARTED_AGAIN, Fenced, Gap, LocalError)
# Nor does what is about the answer, at opening: no room for it, now or ever, or a door that is not known there yet.
_REFUSALS = (Overloaded, InvalidRequest, ContextTooLong, PermissionDenied)


class State(enum.Enum):
    PLANNING = "planning"  # no route yet
    OPENING = "opening"  # the stages of this epoch reserve their KV
    FEEDING = "feeding"  # one step is in flight
    WAITING = "waiting"  # for somebody to hold again what nobody answers for
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Routed:
    """A route was planned: the first one, or another after a stage was lost (which raises the epoch)."""

    route: Route


@dataclass(frozen=True, slots=True)
class Opened:
    """All stages accepted the session; `held` are the positions whose KV each of them has."""

    epoch: Epoch
    held: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TokenArrived:
    epoch: Epoch
    position: int  # after the last row of the step that it answers = the token's own position
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    prompt_logprobs: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class StepFailed:
    """What was in flight (a plan, an open, a step) failed.  A Gap is answered by feeding again from what is held.

    `stage`, `peer`: whose failure it is; None where no stage is to blame, as for a plan.
    """

    epoch: Epoch
    error: ShoalError
    stage: int | None = None
    peer: PeerId | None = None


@dataclass(frozen=True, slots=True)
class StopStringFound:
    """The door saw a stop string in the text of the tokens emitted so far."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    """`suspects`: the other nodes of the route that are to blame, as far as can be told."""

    suspects: frozenset[PeerId] = frozenset()


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client is gone, or gave up."""


Event = Routed | Opened | TokenArrived | StepFailed | StopStringFound | DeadlinePassed | Cancelled


@dataclass(frozen=True, slots=True)
class Plan:
    """Answered by Routed or, at the same epoch and without a peer, by StepFailed."""

    avoid: frozenset[PeerId]


@dataclass(frozen=True, slots=True)
class Tell:
    """For the client: something happened, and the answer goes on."""

    code: str
    message: str
    peer: PeerId | None


@dataclass(frozen=True, slots=True)
class OpenStages:
    """Where the session is open already its epoch is raised.  A stage that is new to it holds nothing."""

    epoch: Epoch
    route: Route
    positions: int  # KV to reserve now, so that an admitted answer never dies for want of it


@dataclass(frozen=True, slots=True)
class SendStep:
    epoch: Epoch
    start: int
    tokens: tuple[int, ...]
    until: int  # position after the last row of the whole feed


@dataclass(frozen=True, slots=True)
class Emit:
    """To be given to the client; it is in the log already."""

    token: int
    position: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    prompt_logprobs: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class CloseStages:
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class Finish:
    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Fail:
    error: ShoalError


Effect = Plan | Tell | OpenStages | SendStep | Emit | CloseStages | Finish | Fail


# What may happen in which state.  DONE and FAILED take everything that was under way when the answer ended, and drop
# it; but nobody may give them a route.  So do PLANNING and WAITING with what a lost route still answers.
TRANSITIONS: dict[State, tuple[type[Event], ...]] = {
    State.PLANNING: (Routed, Opened, TokenArrived, StepFailed, DeadlinePassed, Cancelled),
    State.OPENING: (Routed, Opened, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
    State.FEEDING: (Routed, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
    State.WAITING: (Opened, TokenArrived, StepFailed, DeadlinePassed, Cancelled),
    State.DONE: (Opened, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
    State.FAILED: (Opened, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
}


def rewind(log_length: int, held: Iterable[int]) -> int:
    """The position from which to feed again; `held` has one entry for each stage, or for its successor."""
    return min([log_length - 1, *held])


def is_held_against(error: ShoalError, *, opening: bool) -> bool:
    """Whether a stage's failure counts against its peer, for other answers too.  `opening`: nothing was fed yet."""
    return not isinstance(error, (*_NO_FAULT, *_REFUSALS) if opening else _NO_FAULT)


class Session:
    """The core of one answer.

    The driver executes effects in order, and calls handle(DeadlinePassed(), now) when `deadline` comes.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        *,
        door: PeerId,
        context: int,
        recompute_at: int | None = None,
        step_deadline_s: float = 60.0,
        repair_wait_s: float = 30.0,
        expert_wait_s: float = 10.0,
        reroutes_max: int = REROUTES_MAX,
    ) -> None:
        if not prompt or len(prompt) >= context:
            raise ContextTooLong(
                f"a prompt of {len(prompt)} tokens does not fit a context of {context}: "
                f"give between 1 and {context - 1} tokens"
            )
        self.state = State.PLANNING
        self.epoch = Epoch(0, door)
        self.log: list[int] = list(prompt)
        self.prompt_length = len(prompt)
        self.deadline: float | None = None
        self._params = params
        self._length_max = min(len(prompt) + params.max_tokens, context)
        self._recompute_at = recompute_at
        self._step_deadline_s = step_deadline_s
        self._repair_wait_s = repair_wait_s
        self._expert_wait_s = expert_wait_s
        self._floor_s = STEP_DEADLINE_S_MIN  # of the present route
        self._reroutes_left = reroutes_max
        self._start = 0  # of the step in flight
        self._sent_at = 0.0
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)  # of this route's last steps, for DEADLINE_ROWS rows
        self._opened = False  # a stage may hold something
        self._avoid: frozenset[PeerId] = frozenset()
        # Of those, who answered wrongly: avoided even if nobody else is left.
        self._at_fault: frozenset[PeerId] = frozenset()
        self._lost: ShoalError | None = None  # what broke the answer, until it goes on
        self._has_route = False  # one that opened, and of which no stage is lost
        self._was_admitted = False  # a route has opened
        self._repair_until: float | None = None
        self._retry_s = RETRY_S_MIN
        # The log's length at the last step that ended: for which the KV that counts was computed (see recompute_at).
        self._computed_for = 0

    @property
    def generated(self) -> int:
        return len(self.log) - self.prompt_length

    @property
    def ended(self) -> bool:
        return self.state in (State.DONE, State.FAILED)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What to do about `event`, in order.  Raises IllegalTransition, and then nothing has changed."""
        if not isinstance(event, TRANSITIONS[self.state]):
            raise IllegalTransition(f"{type(event).__name__} cannot happen to a session that is {self.state.value}")
        if self.ended or self._is_stale(event):
            return []
        match event:
            case Routed():
                return self._open(event.route, now)
            case Opened():
                self._recent_s.clear()
                self._has_route = self._was_admitted = True
                return [self._feed(rewind(len(self.log), event.held), now)]
            case TokenArrived():
                return self._accept(event, now)
            case StepFailed():
                return self._step_failed(event, now)
            case StopStringFound():
                return self._finish("stop_string")
            case DeadlinePassed():
                return self._deadline_passed(event.suspects, now)
            case Cancelled():
                return self._finish("cancelled")

    def _is_stale(self, event: Event) -> bool:
        """Whether to drop it: of a lower epoch, or the answer to a step that a rewind overtook."""
        if not isinstance(event, Opened | TokenArrived | StepFailed):
            return False
        if event.epoch > self.epoch:
            raise IllegalTransition(
                f"{type(event).__name__} carries epoch {event.epoch}; only the door of {self.epoch} raises it"
            )
        if event.epoch < self.epoch:
            return True
        if self.state is State.WAITING:
            return True
        if self.state is State.PLANNING:  # what several stages tell of one failure counts once; a plan has no peer
            return not isinstance(event, StepFailed) or event.peer is not None
        if not isinstance(event, TokenArrived):
            return False
        if self.state is State.OPENING or event.position > len(self.log):
            raise IllegalTransition(
                f"a token for position {event.position} answers no step of a {self.state.value} log of {len(self.log)}"
            )
        return event.position < len(self.log)

    def _open(self, route: Route, now: float) -> list[Effect]:
        self.epoch = Epoch(self.epoch.counter + 1, self.epoch.door)
        self.state = State.OPENING
        self._opened = True
        self._floor_s = STEP_DEADLINE_S_MIN + (self._expert_wait_s if route.fans_out else 0.0)
        self.deadline = now + self._step_deadline_s
        return [OpenStages(self.epoch, route, self._length_max)]

    def _feed(self, start: int, now: float) -> SendStep:
        length = len(self.log)
        if self._recompute_at is not None and self._computed_for <= self._recompute_at < length:
            start = 0
        self.state = State.FEEDING
        self._start = start
        self._sent_at = now
        self.deadline = now + self._patience_s() * self._parts
        return SendStep(self.epoch, start, tuple(self.log[start:]), length)

    @property
    def _parts(self) -> int:
        """Of the step in flight."""
        return -(-(len(self.log) - self._start) // DEADLINE_ROWS)

    def _patience_s(self) -> float:
        """For DEADLINE_ROWS rows.  The first step of a route may also load, compile and warm up; and how long many rows
        take cannot be told from steps of one.
        """
        if not self._recent_s or len(self.log) - self._start > 1:
            return self._step_deadline_s
        return min(max(SLOW_STEPS * max(self._recent_s), self._floor_s), self._step_deadline_s)

    def _accept(self, event: TokenArrived, now: float) -> list[Effect]:
        self._computed_for = event.position
        self._recent_s.append((now - self._sent_at) / self._parts)
        self._repair_until, self._retry_s, self._lost = None, RETRY_S_MIN, None
        self.log.append(event.token)
        emit = Emit(event.token, event.position, event.logprob, event.top, event.prompt_logprobs)
        if event.token in self._params.stop_tokens:
            return [emit, *self._finish("stop")]
        if len(self.log) == self._length_max:
            return [emit, *self._finish("length")]
        return [self._feed(len(self.log) - 1, now), emit]

    def _step_failed(self, event: StepFailed, now: float) -> list[Effect]:
        error = event.error
        if self.state is State.PLANNING:
            return self._no_route(error, now)
        if self.state is State.FEEDING:
            if isinstance(error, Gap) and error.held < self._start:  # because each resend starts lower, they end
                return [self._feed(error.held, now)]
            if isinstance(error, ExpertsUnreachable):
                return self._wait(error, event.peer, now)
        full = self.state is State.OPENING and isinstance(error, Overloaded)
        is_own = event.peer is None or event.peer == self.epoch.door
        if event.peer is None or isinstance(error, LocalError | Fenced) or (is_own and not full):
            return self._fail(error)
        return self._reroute(error, frozenset({event.peer}), now)

    def _reroute(self, error: ShoalError, peers: frozenset[PeerId], now: float) -> list[Effect]:
        self._has_route = False
        self._avoid |= peers
        if isinstance(error, RemoteError) and not isinstance(error, _STARTED_AGAIN):
            self._at_fault |= peers
        self._lost = self._lost or error  # what broke the answer, not what else was found gone while it was mended
        if self._repair_until is not None:  # the waiting's own gaps and end bound these tries
            return self._wait(self._lost, None, now)
        if not self._reroutes_left:
            return self._fail(error)
        self._reroutes_left -= 1
        told = Tell(error.code, f"{error.message}; looking for another way", min(peers))
        return [told, self._plan(now)]

    def _plan(self, now: float) -> Plan:
        self.state = State.PLANNING
        self.deadline = now + self._step_deadline_s
        return Plan(self._avoid)

    def _no_route(self, error: ShoalError, now: float) -> list[Effect]:
        """No route at all is refused at once; one that was lost may come back."""
        if self._lost is None or isinstance(error, LocalError):
            return self._fail(error)
        if isinstance(self._lost, Overloaded) and not self._was_admitted:
            return self._fail(self._lost)
        self._avoid = self._at_fault
        return self._wait(self._lost, None, now)

    def _wait(self, error: ShoalError, peer: PeerId | None, now: float) -> list[Effect]:
        told: list[Effect] = []
        if self._repair_until is None:
            self._repair_until = now + self._repair_wait_s
            told = [Tell(error.code, f"{error.message}; waiting up to {self._repair_wait_s:g} s for it", peer)]
        if now >= self._repair_until:
            return self._fail(error)
        self.state = State.WAITING
        self.deadline = min(now + self._retry_s, self._repair_until)
        self._retry_s = min(2 * self._retry_s, RETRY_S_MAX)
        return told

    def _deadline_passed(self, suspects: frozenset[PeerId], now: float) -> list[Effect]:
        if self.state is State.WAITING:
            return [self._feed(self._start, now) if self._has_route else self._plan(now)]
        if suspects and self.state is not State.PLANNING:
            named = ", ".join(sorted(peer[:8] for peer in suspects))
            return self._reroute(DeadlineExceeded(f"an answer got no further than {named} in time"), suspects, now)
        whole = self._sent_at + self._step_deadline_s * self._parts
        if self.state is State.FEEDING and now < whole:  # slower than usual, and nobody is to blame
            self.deadline = whole
            return []
        return self._fail(self._late())

    def _finish(self, reason: FinishReason) -> list[Effect]:
        return [*self._close(State.DONE), Finish(reason)]

    def _fail(self, error: ShoalError) -> list[Effect]:
        return [*self._close(State.FAILED), Fail(error)]

    def _close(self, state: State) -> list[Effect]:
        """Stages may hold KV as soon as an open was sent, whether or not it was acknowledged."""
        self.state = state
        self.deadline = None
        return [CloseStages(self.epoch)] if self._opened else []

    def _late(self) -> DeadlineExceeded:
        what = "a route" if self.state is State.PLANNING else "its stages" if self.state is State.OPENING else "a step"
        return DeadlineExceeded(
            f"the answer waited longer for {what} than step_deadline_s allows ({self._step_deadline_s:g} s); "
            "the node is too busy or stuck: try again later, or raise the deadline"
        )
