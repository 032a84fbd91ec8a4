"""Admission: which sessions run, which wait, and who is refused at once.

Pure: `handle(event, now) -> list[Effect]`.  Both numbers are bounded: a surge gets an early refusal with a retry-after,
never silence, and no admitted session is ever put back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.errors import IllegalTransition, Overloaded

if TYPE_CHECKING:
    from protos.errors import ShoalError
    from protos.ids import SessionId

RETRY_AFTER_S_MIN = 1.0
RETRY_AFTER_S_MAX = 60.0
# Weight of the newest session in the running mean of how long one takes.
_MEAN_WEIGHT = 0.2


@dataclass(frozen=True, slots=True)
class Asked:
    session: SessionId


@dataclass(frozen=True, slots=True)
class Left:
    """The session ended, or its client gave up while it waited."""

    session: SessionId


@dataclass(frozen=True, slots=True)
class Tick:
    """`deadline` has come."""


Event = Asked | Left | Tick


@dataclass(frozen=True, slots=True)
class Admit:
    session: SessionId


@dataclass(frozen=True, slots=True)
class Refuse:
    session: SessionId
    error: ShoalError


Effect = Admit | Refuse


class Admission:
    """First come, first served: `sessions_max` run, `queue_max` wait, each for at most `queue_wait_s_max`."""

    def __init__(self, sessions_max: int, queue_max: int, queue_wait_s_max: float = 60.0) -> None:
        self._sessions_max = sessions_max
        self._queue_max = queue_max
        self._queue_wait_s_max = queue_wait_s_max
        self._running: dict[SessionId, float] = {}  # since when
        self._waiting: deque[tuple[float, SessionId]] = deque()  # since when, oldest first
        self._session_s_mean: float | None = None

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def deadline(self) -> float | None:
        """When handle(Tick(), now) is due next."""
        return self._waiting[0][0] + self._queue_wait_s_max if self._waiting else None

    def handle(self, event: Event, now: float) -> list[Effect]:
        match event:
            case Asked(session):
                return self._ask(session, now)
            case Left(session):
                return self._leave(session, now)
            case Tick():
                return self._expire(now)

    def _ask(self, session: SessionId, now: float) -> list[Effect]:
        if session in self._running or self._is_waiting(session):
            raise IllegalTransition(f"session {session} asked twice to be admitted")
        if len(self._running) < self._sessions_max:
            self._running[session] = now
            return [Admit(session)]
        if len(self._waiting) < self._queue_max:
            self._waiting.append((now, session))
            return []
        return [Refuse(session, self._overloaded("no place is left in the queue"))]

    def _leave(self, session: SessionId, now: float) -> list[Effect]:
        if self._is_waiting(session):
            self._waiting = deque(entry for entry in self._waiting if entry[1] != session)
            return []
        if session not in self._running:
            raise IllegalTransition(f"session {session} left, but neither runs nor waits")
        self._learn(now - self._running.pop(session))
        if not self._waiting:
            return []
        _, heir = self._waiting.popleft()
        self._running[heir] = now
        return [Admit(heir)]

    def _expire(self, now: float) -> list[Effect]:
        refused: list[Effect] = []
        while self._waiting and self._waiting[0][0] + self._queue_wait_s_max <= now:
            _, session = self._waiting.popleft()
            refused.append(Refuse(session, self._overloaded(f"no turn came within {self._queue_wait_s_max:g} s")))
        return refused

    def _is_waiting(self, session: SessionId) -> bool:
        return any(waiting == session for _, waiting in self._waiting)

    def _learn(self, session_s: float) -> None:
        mean = session_s if self._session_s_mean is None else self._session_s_mean
        self._session_s_mean = mean + _MEAN_WEIGHT * (session_s - mean)

    def _overloaded(self, reason: str) -> Overloaded:
        retry_after_s = self._retry_after_s()
        return Overloaded(
            f"{reason}: {self.running} sessions run and {self.waiting} wait; try again in {retry_after_s:.0f} s",
            retry_after_s=retry_after_s,
        )

    def _retry_after_s(self) -> float:
        """About when the queue will have moved by one place for each that waits."""
        mean = RETRY_AFTER_S_MIN if self._session_s_mean is None else self._session_s_mean
        estimate = mean * (len(self._waiting) + 1) / self._sessions_max
        return min(max(estimate, RETRY_AFTER_S_MIN), RETRY_AFTER_S_MAX)
