"""Reach: which peers answer this node, how fast, and whom to try next.

Pure: the clock (monotonic seconds) and randomness are arguments.  Law: a peer is DEAD here only by this node's own
failed tries, and is tried for as long as its record holds; what this node observes is told to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.view import Health

if TYPE_CHECKING:
    from collections.abc import Collection
    from random import Random

    from protos.ids import PeerId

TRIES_MAX = 3
"""Failed tries in a row after which a peer is DEAD."""

RETRY_S_MAX = 8.0
"""Between two tries of a peer that does not answer."""

# Weight of a new sample of the round-trip time, as TCP's (RFC 6298).
_GAIN = 1 / 8


@dataclass(slots=True)
class _Entry:
    reached: bool = False
    misses: int = 0  # in a row
    retry_at: float = 0.0
    rtt_s: float | None = None
    heard_at: float | None = None
    last_error: str = ""


class Reach:
    """About peers whose records are known: `forget` those that are not."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._entries: dict[PeerId, _Entry] = {}

    def answered(self, peer: PeerId, rtt_s: float, now: float) -> None:
        """A try succeeded."""
        entry = self._entry(peer)
        known = entry.rtt_s
        entry.rtt_s = rtt_s if known is None else known + _GAIN * (rtt_s - known)
        entry.reached = True
        entry.misses = 0
        entry.heard_at = now

    def missed(self, peer: PeerId, error: str, now: float) -> None:
        """A try failed: the next one comes after the period, later each time once the peer is DEAD."""
        entry = self._entry(peer)
        entry.misses = min(entry.misses + 1, 32)
        entry.retry_at = now + min(self._period_s * 2.0 ** max(0, entry.misses - TRIES_MAX), RETRY_S_MAX)
        entry.last_error = error

    def heard(self, peer: PeerId, now: float) -> None:
        """It called, or answered another kind of call.  One that was given up is tried again at once."""
        entry = self._entry(peer)
        entry.heard_at = now
        if entry.misses:
            entry.retry_at = now

    def suspect(self, peer: PeerId, now: float) -> None:
        """Something else could not reach it: try it at once."""
        entry = self._entry(peer)
        if not entry.misses:
            entry.misses = 1
        if entry.misses < TRIES_MAX:
            entry.retry_at = now

    def forget(self, peer: PeerId) -> None:
        self._entries.pop(peer, None)

    def due(self, peers: Collection[PeerId], now: float, random: Random, count_max: int) -> list[PeerId]:
        """Whom to try now: one of those that are well at random, and whoever was never reached or does not answer.

        The last place is kept for peers that are well, if there are any: the others hold theirs for seconds.
        """
        urgent, others = [], []
        for peer in sorted(peers):
            entry = self._entry(peer)
            if not entry.reached or entry.misses:
                if entry.retry_at <= now:
                    urgent.append(peer)
            else:
                others.append(peer)
        random.shuffle(urgent)
        kept = int(any(entry.reached and not entry.misses for entry in self._entries.values()))
        return (random.sample(others, min(1, len(others))) + urgent[: max(0, count_max - kept)])[:count_max]

    def state(self, peer: PeerId) -> Health:
        entry = self._entries.get(peer, _Entry())
        if entry.misses >= TRIES_MAX:
            return Health.DEAD
        return Health.SUSPECT if entry.misses or not entry.reached else Health.ALIVE

    def reached(self, peer: PeerId) -> bool:
        """Whether it ever answered."""
        return peer in self._entries and self._entries[peer].reached

    def rtt_s(self, peer: PeerId) -> float | None:
        return self._entries[peer].rtt_s if peer in self._entries else None

    def age_s(self, peer: PeerId, now: float) -> float | None:
        """Since it was last heard of; None: never."""
        entry = self._entries.get(peer)
        return None if entry is None or entry.heard_at is None else now - entry.heard_at

    def last_error(self, peer: PeerId) -> str:
        return self._entries[peer].last_error if peer in self._entries else ""

    def _entry(self, peer: PeerId) -> _Entry:
        return self._entries.setdefault(peer, _Entry())
