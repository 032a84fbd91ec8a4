"""A suspicion's timer: it runs faster with each independent accuser (Lifeguard).  PROTOCOL.md, section 15.

Pure.  Law: an accuser counts once, the first one not at all; with all confirmations that are needed the timer takes the
shortest time, with none the longest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node.claim import PeerHash, Suspicion
    from node.profile import Profile


class SuspicionTimer:
    """Of one peer in one incarnation.  `accusers` hold their signed words, the first one first."""

    __slots__ = ("_longest_s", "_shortest_s", "accusers", "began_at", "needed")

    def __init__(self, first: Suspicion, now: float, members: int, profile: Profile) -> None:
        """`members`: active ones, this node and the suspect among them."""
        self.accusers: dict[PeerHash, Suspicion] = {first.accuser: first}
        self.began_at = now
        self.needed = confirmations_needed(members, profile)
        self._shortest_s = shortest_s(members, profile)
        self._longest_s = self._shortest_s * (profile.suspicion_max_multiplier if self.needed else 1)

    @property
    def full(self) -> bool:
        """More accusers would change nothing."""
        return len(self.accusers) > self.needed

    def add(self, suspicion: Suspicion) -> None:
        self.accusers[suspicion.accuser] = suspicion

    def deadline(self, stretch: float) -> float:
        """When the suspect is dead if nobody refutes.  `stretch`: 1 + the local health score, or 1."""
        return self.began_at + stretch * self._timeout_s()

    def _timeout_s(self) -> float:
        """memberlist's remainingSuspicionTime: max - (max - min) * log(c + 1) / log(k + 1)."""
        if not self.needed:
            return self._shortest_s
        share = math.log(len(self.accusers)) / math.log(self.needed + 1)
        return max(self._shortest_s, self._longest_s - (self._longest_s - self._shortest_s) * share)


def shortest_s(members: int, profile: Profile) -> float:
    """memberlist's suspicionTimeout: multiplier * max(1, log10 n) * probe period."""
    return profile.suspicion_multiplier * max(1.0, math.log10(max(1, members))) * profile.probe_period_s


def confirmations_needed(members: int, profile: Profile) -> int:
    """memberlist's k: none where there are too few members to give them, or where they would change nothing."""
    wanted = min(profile.suspicion_multiplier - 2, profile.accusers_max - 1)
    if profile.suspicion_max_multiplier <= 1 or members - 2 < wanted:
        return 0
    return max(0, wanted)
