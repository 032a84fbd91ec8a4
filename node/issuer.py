"""Issuer: when a node signs a new record of itself, and with which sequence.  PROTOCOL.md, section 14.

Pure: the clock is an argument; it counts from 1970.  Law: a record is issued when what it says changes or half of its
time is over, never twice within RECORD_GAP_S, and each has a higher sequence than all before, also before a restart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from node.record import Record

RECORD_S: Final = 3600.0
"""How long a record holds.  Membership says within seconds who is gone, so a record need not."""

RECORD_GAP_S: Final = 10.0
"""Between two records of a node: changes in between go together.  Ten thousand nodes pass on each of them."""


class Issuer:
    """Of one node.  `own`: what its record says; its sequence is the last known one (0: none), its times do not matter.

    `ends_at_ms`: no record holds longer, as a grant does not; None: nothing ends it.
    """

    def __init__(self, own: Record, *, ends_at_ms: int | None = None) -> None:
        self._own = own
        self._ends_at_ms = ends_at_ms
        self._sequence = own.sequence
        self._wants = True
        self._issued_at: float | None = None

    def say(self, own: Record) -> None:
        """From now on the record says this; its sequence and times count not.  What it says already is no change."""
        said = replace(
            own,
            sequence=self._own.sequence,
            issued_at_ms=self._own.issued_at_ms,
            expires_at_ms=self._own.expires_at_ms,
        )
        self._wants |= said != self._own
        self._own = said

    def outrank(self, sequence: int) -> None:
        """Somebody knows this sequence of this node: its clock went back, or it lost its last one."""
        if sequence >= self._sequence:
            self._sequence = sequence
            self._wants = True

    @property
    def deadline(self) -> float:
        """When `issue` has something to give."""
        if self._issued_at is None:
            return 0.0
        if self._wants:
            return self._issued_at + RECORD_GAP_S
        half_s = (self._own.expires_at_ms - self._own.issued_at_ms) / 2000
        return max(self._issued_at + half_s, self._issued_at + RECORD_GAP_S)

    def issue(self, now: float) -> Record | None:
        """The next record, to be signed; None: not yet."""
        if self._issued_at is not None and now < self._issued_at:
            self._issued_at = now - RECORD_GAP_S  # the clock went back, and others' clocks may be right
            self._wants = True
        if now < self.deadline:
            return None
        now_ms = int(now * 1000)
        expires_at_ms = now_ms + int(RECORD_S * 1000)
        if self._ends_at_ms is not None:
            expires_at_ms = min(expires_at_ms, max(self._ends_at_ms, now_ms + 1))
        self._sequence = max(now_ms, self._sequence + 1)
        self._own = replace(self._own, sequence=self._sequence, issued_at_ms=now_ms, expires_at_ms=expires_at_ms)
        self._wants = False
        self._issued_at = now
        return self._own
