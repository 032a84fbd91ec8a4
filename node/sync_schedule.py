"""When this node begins push-pulls, and with whom.  PROTOCOL.md, section 15.

Pure; randomness is an argument.  Law: those that are asked for keep a gap, whoever asks, and a member goes before a
stranger.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

    from node.claim import PeerHash
    from node.member_table import MemberTable
    from node.profile import Profile


class SyncSchedule:
    """One push-pull comes now and then, at a random time; others are asked for."""

    __slots__ = ("_asked_at", "_at", "_began_at", "_profile", "_random", "_stranger", "_table", "_wanted")

    def __init__(self, table: MemberTable, random: random.Random, profile: Profile, now: float) -> None:
        self._table = table
        self._random = random
        self._profile = profile
        self._began_at = -math.inf
        self._asked_at = math.inf
        self._wanted: PeerHash | None = None  # whom to sync with then
        self._stranger: PeerHash | None = None
        self._at = math.inf
        if table.active:
            self._at = now + random.random() * self._scaled(profile.sync_period_s)

    @property
    def deadline(self) -> float:
        return min(self._at, self._asked_at)

    def want(self, teller: PeerHash, now: float) -> None:
        """That member knows something that is wanted here."""
        if self._wanted is None:
            self._wanted = teller
            self._ask(now)

    def meet(self, stranger: PeerHash, now: float) -> None:
        if self._stranger is None:
            self._stranger = stranger
            self._ask(now)

    def done_with(self, peer: PeerHash) -> None:
        """A push-pull with it has ended, whichever side began it."""
        if peer in (self._wanted, self._stranger):
            self._wanted = self._stranger = None
            self._asked_at = math.inf

    def hasten(self, now: float) -> None:
        """There is something that gossip has no room for."""
        self._at = min(self._at, now + (1 + self._random.random()) * self._scaled(self._profile.sync_gap_s))

    def hasten_first(self, now: float) -> None:
        """The first peer is known, who may know others."""
        self._at = min(self._at, now + self._random.random() * self._profile.sync_first_s)

    def take_due(self, now: float) -> PeerHash | None:
        """With whom to begin one because it is time for one."""
        if now < self._at:
            return None
        self._at = now + (0.5 + self._random.random()) * self._scaled(self._profile.sync_period_s)
        return self._begin(next(iter(self._table.pick(1)), None), now)

    def take_asked(self, now: float) -> PeerHash | None:
        """With whom to begin one because it was asked for."""
        if now < self._asked_at:
            return None
        peer = self._wanted or self._stranger
        self._wanted = self._stranger = None
        self._asked_at = math.inf
        return self._begin(peer, now)

    def _begin(self, peer: PeerHash | None, now: float) -> PeerHash | None:
        if peer is not None:
            self._began_at = now
        return peer

    def _ask(self, now: float) -> None:
        """At once, or when the gap since the last one is over."""
        at = max(now, self._began_at + self._scaled(self._profile.sync_gap_s))
        self._asked_at = min(self._asked_at, at)

    def _scaled(self, period_s: float) -> float:
        """memberlist's pushPullScale: beyond 32 members a doubling adds one more period."""
        members = self._table.active + 1
        return period_s * (math.ceil(math.log2(members) - 5) + 1 if members > 32 else 1)
