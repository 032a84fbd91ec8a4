"""Local health: how well this node itself is, by what its probes come to (Lifeguard).  PROTOCOL.md, section 15.

Pure.  Law: the score stays from 0, which is well, to below `health_max`; one accuser, or a crowd of them, must not keep
a healthy node ill: its own probes say how it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node.claim import PeerHash
    from node.profile import Profile


class LocalHealth:
    """`score` is Lifeguard's local health multiplier, less one."""

    __slots__ = ("_accused_at", "_profile", "_refuted_at", "score")

    def __init__(self, profile: Profile) -> None:
        self.score = 0
        self._profile = profile
        self._refuted_at = -math.inf
        self._accused_at: dict[PeerHash, float] = {}  # when an accuser's word last told on health, the oldest first

    @property
    def stretch(self) -> int:
        """So many times longer are period and timeout."""
        return 1 + self.score

    @property
    def suspicion_stretch(self) -> float:
        """So many times longer is a suspicion."""
        return min(1.0 + self.score, self._profile.suspicion_stretch_max)

    def change(self, by: int) -> None:
        self.score = min(max(0, self.score + by), self._profile.health_max - 1)

    def count_accuser(self, accuser: PeerHash, now: float) -> None:
        """Its accusation, which this node refutes, counts one against it, unless such words have counted of late."""
        if now - self._refuted_at >= self._profile.probe_period_s and self._counts(accuser, now):
            self._refuted_at = self._accused_at[accuser] = now
            self.change(1)

    def _counts(self, accuser: PeerHash, now: float) -> bool:
        while self._accused_at:
            oldest, at = next(iter(self._accused_at.items()))
            if now - at < self._profile.accuser_gap_s:
                break
            del self._accused_at[oldest]
        return accuser not in self._accused_at and len(self._accused_at) < self._profile.health_max
