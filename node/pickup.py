"""Pickup: results that wait at a stage until their door comes for them, because nobody can call that door.

Thread-safe.  Laws: one reader at a time, the latest; results leave in the order in which they came; no more of them
wait than RESULTS_AHEAD_MAX.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from protos.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from protos.errors import ShoalError
    from protos.stage_pb2 import StepResult

RESULTS_AHEAD_MAX: Final = 2048
"""Waiting for one door, whether it is called or comes."""


@dataclass(slots=True, eq=False)
class Reader:
    """One coming of the door."""

    is_over: bool = False
    failed: ShoalError | None = None
    """What ended it, where that was what the door said."""


class Pickup:
    """Of one door."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], StepResult]] = deque()
        self._reader: Reader | None = None
        self._changed = threading.Condition()

    @property
    def is_read(self) -> bool:
        return self._reader is not None

    def put(self, make: Callable[[], StepResult]) -> None:
        """`make` encodes the result, in the reader's thread.  Raises Overloaded."""
        with self._changed:
            if len(self._waiting) >= RESULTS_AHEAD_MAX:
                raise Overloaded(f"{RESULTS_AHEAD_MAX} results wait for their door to come", retry_after_s=1.0)
            self._waiting.append(make)
            self._changed.notify_all()

    def begin(self, reader: Reader) -> None:
        """From now on it reads, and nobody else."""
        with self._changed:
            if self._reader is not None:
                self._reader.is_over = True
            self._reader = reader
            self._changed.notify_all()

    def read(self, reader: Reader) -> Iterator[StepResult]:
        """After `begin`: what waits and what comes, until its end."""
        while (make := self._next(reader)) is not None:
            yield make()

    def end(self, reader: Reader | None = None) -> None:
        """Ends this reader's reading; None: whoever reads."""
        with self._changed:
            ending = reader or self._reader
            if ending is not None:
                ending.is_over = True
            if ending is self._reader:
                self._reader = None
            self._changed.notify_all()

    def _next(self, reader: Reader) -> Callable[[], StepResult] | None:
        with self._changed:
            self._changed.wait_for(lambda: reader.is_over or self._waiting)
            return None if reader.is_over else self._waiting.popleft()
