"""Suspicions: what is held against members, and when it becomes a death.  PROTOCOL.md, section 15.

Pure.  Law: a suspect has a timer and one of the dead a notice, nobody else has either; nothing but a timer that ran out
makes a death.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from node.suspicion import SuspicionTimer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.claim import PeerHash, Suspicion
    from node.profile import Profile


class Suspicions:
    """`own`: this node, whose own word is the notice where it is among the accusers."""

    __slots__ = ("_expiries", "_notices", "_own", "_profile", "_timers")

    def __init__(self, own: PeerHash, profile: Profile) -> None:
        self._own = own
        self._profile = profile
        self._timers: dict[PeerHash, SuspicionTimer] = {}  # of the suspects
        self._expiries: list[tuple[float, PeerHash]] = []  # a heap; a timer that changed has several entries in it
        self._notices: dict[PeerHash, Suspicion] = {}  # of the dead: what to tell them

    def __iter__(self) -> Iterator[Suspicion]:
        """Those in force, and one for each of the dead."""
        for timer in self._timers.values():
            yield from timer.accusers.values()
        yield from self._notices.values()

    @property
    def deadline(self) -> float:
        """When `next_expired` is to be asked next."""
        return self._expiries[0][0] if self._expiries else math.inf

    def counts(self, subject: PeerHash, accuser: PeerHash) -> bool:
        """Whether a word of that accuser would be new, and of use."""
        timer = self._timers.get(subject)
        return timer is None or not (timer.full or accuser in timer.accusers)

    def add(self, suspicion: Suspicion, members: int, now: float) -> bool:
        """True: it is the first one of its subject, among so many active members."""
        peer = suspicion.subject
        timer = self._timers.get(peer)
        is_first = timer is None
        if timer is None:
            timer = self._timers[peer] = SuspicionTimer(suspicion, now, members, self._profile)
        else:
            timer.add(suspicion)
        heapq.heappush(self._expiries, (timer.deadline(1), peer))
        return is_first

    def next_expired(self, stretch: float, now: float) -> PeerHash | None:
        """A timer that is stretched by ill health, or was moved by a pause, is looked at again in each period."""
        while self._expiries and self._expiries[0][0] <= now:
            _, peer = heapq.heappop(self._expiries)
            timer = self._timers.get(peer)
            if timer is None:
                continue
            due = timer.deadline(stretch)
            if due <= now:
                return peer
            heapq.heappush(self._expiries, (min(due, now + self._profile.probe_period_s), peer))
        return None

    def conclude(self, suspect: PeerHash) -> None:
        """It is dead: one of the words against it is kept, to tell it."""
        accusers = self._timers.pop(suspect).accusers
        self.keep_notice(accusers.get(self._own) or next(iter(accusers.values())))

    def keep_notice(self, suspicion: Suspicion) -> None:
        self._notices[suspicion.subject] = suspicion

    def clear(self, peer: PeerHash) -> list[PeerHash]:
        """What was held against it is over.  Whose words that were."""
        timer = self._timers.pop(peer, None)
        notice = self._notices.pop(peer, None)
        accusers = list(timer.accusers) if timer is not None else []
        return accusers if notice is None else [*accusers, notice.accuser]

    def first_word(self, suspect: PeerHash) -> Suspicion:
        return next(iter(self._timers[suspect].accusers.values()))

    def notice(self, dead: PeerHash) -> Suspicion:
        return self._notices[dead]

    def postpone(self, late_s: float) -> None:
        """This process stood still for so long."""
        for timer in self._timers.values():
            timer.began_at += late_s
