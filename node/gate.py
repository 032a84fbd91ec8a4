"""Gate: where answers wait for admission.  Drives coordinator.admission; decides nothing.

Law: whoever has entered has left when its block ends, however it ends.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from coordinator.admission import Admission, Admit, Asked, Left, Tick

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from coordinator.admission import Event
    from protos.errors import ShoalError
    from protos.ids import SessionId


class Gate:
    def __init__(self, core: Admission) -> None:
        self._core = core
        self._waiters: dict[SessionId, _Waiter] = {}

    @property
    def running(self) -> int:
        return self._core.running

    @asynccontextmanager
    async def admitted(self, session: SessionId) -> AsyncIterator[None]:
        """A block that runs while the session has a place.  Raises Overloaded if it gets none."""
        waiter = self._waiters[session] = _Waiter()
        self._handle(Asked(session))
        try:
            await self._wait(waiter)
            yield
        finally:
            del self._waiters[session]
            if waiter.error is None:
                self._handle(Left(session))

    async def _wait(self, waiter: _Waiter) -> None:
        while not waiter.answered.is_set():
            deadline = self._core.deadline
            with trio.move_on_at(math.inf if deadline is None else deadline):
                await waiter.answered.wait()
            self._handle(Tick())
        if waiter.error is not None:
            raise waiter.error

    def _handle(self, event: Event) -> None:
        for effect in self._core.handle(event, trio.current_time()):
            waiter = self._waiters[effect.session]
            waiter.error = None if isinstance(effect, Admit) else effect.error
            waiter.answered.set()


class _Waiter:
    __slots__ = ("answered", "error")

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.error: ShoalError | None = None
