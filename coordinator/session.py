"""Session: one answer, from its plan to its last token (token log, epoch, states as a table).

Pure: `handle(event, now) -> list[Effect]`; an illegal transition raises IllegalTransition and changes nothing.

Laws, in the order in which a token meets them:
- One step is in flight at a time.  A reply counts only if it carries the session's epoch and ends at the log's length;
  whatever carries a lower epoch, or answers a step that was overtaken, is dropped.
- The next step is sent BEFORE the token is emitted (effects are in order of execution), so that the stages compute
  while the door writes text.  A stop string that the door finds then costs one row, whose reply is dropped.
- Rewind law: what every stage still holds need not be computed again, and at least the last token must be fed:
  p = min(len(log) - 1, positions held by all).
- Position-dependent RoPE: KV computed while the log had at most `recompute_at` tokens is wrong for a longer log, so the
  first step beyond it starts at 0 (p = 0), as transformers' generate drops its cache there.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from protos.epoch import Epoch
from protos.errors import ContextTooLong, DeadlineExceeded, Gap, IllegalTransition, ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from coordinator.route import Route
    from protos.ids import PeerId
    from protos.sampling import SamplingParams

FinishReason = Literal["stop", "length", "stop_string", "cancelled"]

# A step may take `step_deadline_s` for each so many rows or part of it: a long prompt is slow, not lost.
DEADLINE_ROWS = 256


class State(enum.Enum):
    PLANNING = "planning"  # no route yet
    OPENING = "opening"  # the stages of this epoch reserve their KV
    FEEDING = "feeding"  # one step is in flight
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
    """What was in flight (a plan, an open, a step) failed.  A Gap is answered by feeding again from what is held."""

    epoch: Epoch
    error: ShoalError


@dataclass(frozen=True, slots=True)
class StopStringFound:
    """The door saw a stop string in the text of the tokens emitted so far."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    pass


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client is gone, or gave up."""


Event = Routed | Opened | TokenArrived | StepFailed | StopStringFound | DeadlinePassed | Cancelled


@dataclass(frozen=True, slots=True)
class OpenStages:
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


Effect = OpenStages | SendStep | Emit | CloseStages | Finish | Fail


# What may happen in which state.  DONE and FAILED take everything that was under way when the answer ended, and drop
# it; but nobody may give them a route.
TRANSITIONS: dict[State, tuple[type[Event], ...]] = {
    State.PLANNING: (Routed, StepFailed, DeadlinePassed, Cancelled),
    State.OPENING: (Routed, Opened, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
    State.FEEDING: (Routed, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
    State.DONE: (Opened, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
    State.FAILED: (Opened, TokenArrived, StepFailed, StopStringFound, DeadlinePassed, Cancelled),
}


def rewind(log_length: int, held: Iterable[int]) -> int:
    """The position from which to feed again; `held` has one entry for each stage, or for its successor."""
    return min([log_length - 1, *held])


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
        self._start = 0  # of the step in flight
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
                self.state = State.FEEDING
                return [self._feed(rewind(len(self.log), event.held), now)]
            case TokenArrived():
                return self._accept(event, now)
            case StepFailed():
                return self._step_failed(event.error, now)
            case StopStringFound():
                return self._finish("stop_string")
            case DeadlinePassed():
                return self._fail(self._late())
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
        self.deadline = now + self._step_deadline_s
        return [OpenStages(self.epoch, route, self._length_max)]

    def _feed(self, start: int, now: float) -> SendStep:
        length = len(self.log)
        if self._recompute_at is not None and self._computed_for <= self._recompute_at < length:
            start = 0
        self._start = start
        self.deadline = now + self._step_deadline_s * -(-(length - start) // DEADLINE_ROWS)
        return SendStep(self.epoch, start, tuple(self.log[start:]), length)

    def _accept(self, event: TokenArrived, now: float) -> list[Effect]:
        self._computed_for = event.position
        self.log.append(event.token)
        emit = Emit(event.token, event.position, event.logprob, event.top, event.prompt_logprobs)
        if event.token in self._params.stop_tokens:
            return [emit, *self._finish("stop")]
        if len(self.log) == self._length_max:
            return [emit, *self._finish("length")]
        return [self._feed(len(self.log) - 1, now), emit]

    def _step_failed(self, error: ShoalError, now: float) -> list[Effect]:
        if not isinstance(error, Gap) or self.state is not State.FEEDING:
            return self._fail(error)
        if error.held >= self._start:  # no gap at all; and because each resend starts lower, they end
            return self._fail(error)
        return [self._feed(error.held, now)]

    def _finish(self, reason: FinishReason) -> list[Effect]:
        return [*self._close(State.DONE), Finish(reason)]

    def _fail(self, error: ShoalError) -> list[Effect]:
        return [*self._close(State.FAILED), Fail(error)]

    def _close(self, state: State) -> list[Effect]:
        """Stages may hold KV as soon as an open was sent, whether or not it was acknowledged."""
        opened = self.state is not State.PLANNING
        self.state = state
        self.deadline = None
        return [CloseStages(self.epoch)] if opened else []

    def _late(self) -> DeadlineExceeded:
        what = "a route" if self.state is State.PLANNING else "its stages" if self.state is State.OPENING else "a step"
        return DeadlineExceeded(
            f"the answer waited longer for {what} than step_deadline_s allows ({self._step_deadline_s:g} s); "
            "the node is too busy or stuck: try again later, or raise the deadline"
        )
