"""Agenda: what happens next, in virtual time.

Law: what is due at the same moment happens in the order in which it was entered, so that a run has one order only.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Agenda:
    """Times are seconds since the beginning of the run."""

    __slots__ = ("_entries", "_serial", "now")

    def __init__(self) -> None:
        self.now = 0.0
        self._serial = 0
        self._entries: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []

    def __len__(self) -> int:
        return len(self._entries)

    def at(self, time_s: float, act: Callable[..., None], *arguments: Any) -> None:
        """What is entered for the past happens now: nobody travels in time."""
        self._serial += 1
        heapq.heappush(self._entries, (max(time_s, self.now), self._serial, act, arguments))

    def after(self, delay_s: float, act: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now + delay_s, act, *arguments)

    def run_until(self, time_s: float) -> None:
        entries = self._entries
        while entries and entries[0][0] <= time_s:
            self.now, _, act, arguments = heapq.heappop(entries)
            act(*arguments)
        self.now = max(self.now, time_s)
