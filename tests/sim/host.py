"""Host: one process of a node on a machine: membership's core, a book of records, and the driver's part in small.

The only file here that knows how membership is called.  Law: it does what node/gossip.py does, and nothing that needs
more than a datagram, a push-pull, a clock and a disk.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from node.census import EMPTY, Census
from node.member import Member, State
from node.membership import Membership
from node.membership_effect import Changed, Send, Sync
from node.membership_event import Leave, Received, RecordIssued, Synced, Tick
from node.profile import LAN, Profile
from tests.sim.book import Book, Page

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

    from node.claim import Claim, Suspicion
    from node.message import Message
    from tests.sim.machine import Machine
    from tests.sim.network import Call
    from tests.sim.notary import Notary, Pen
    from tests.sim.table import Table

NETWORK = bytes(32)
# A seed that has not answered yet is tried so often, one of them at a time.
JOIN_PERIOD_S = 1.5
# Where datagrams of strangers came from: so many are remembered.
SOURCES_MAX = 64


@dataclass(frozen=True, slots=True)
class Datagram:
    """Its signature covers all of it, so a host checks `to` and takes `sender` as given."""

    sender: bytes
    to: bytes
    source: int
    message: Message


@dataclass(frozen=True, slots=True)
class Offer:
    """What one side of a push-pull says."""

    peer: bytes
    pages: tuple[Page, ...]
    claims: tuple[Claim, ...]
    suspicions: tuple[Suspicion, ...]


@dataclass(slots=True)
class Disk:
    """What outlives a process."""

    sequence: int
    book: Book | Table


class Host:
    """`seeds` are addresses.  `disk` is what an earlier process of the same key left."""

    core_class: type[Membership] = Membership

    def __init__(
        self,
        pen: Pen,
        notary: Notary,
        luck: random.Random,
        *,
        seeds: tuple[int, ...] = (),
        disk: Disk | None = None,
        profile: Profile = LAN,
        census: Census = EMPTY,
    ) -> None:
        self.pen = pen
        self.peer = pen.peer
        self.profile = profile
        self.disk = disk or Disk(0, Book(notary.verify))
        self.core: Membership
        self.leaving = False
        self.hides = False  # malice: shows nobody else in a push-pull
        self._notary = notary
        self._luck = luck
        self._seeds = seeds
        self._census = census
        self._machine: Machine
        self._sources: OrderedDict[bytes, int] = OrderedDict()
        self._met: set[int | None] = set()  # addresses that answered
        self._join_at: float | None = None

    # -- life

    def start(self, machine: Machine) -> list[Any]:
        self._machine = machine
        wall_ms = int(machine.wall_s() * 1000)
        page = self._issue(wall_ms)
        self.core = self.core_class(
            self.pen.key,
            NETWORK,
            incarnation=wall_ms,
            sequence=page.sequence,
            sign=self.pen.sign,
            verify=self._notary.verify,
            random=self._luck,
            now=machine.now,
            profile=self.profile,
            census=self._census,
        )
        self._join_at = None if len(self._census) else machine.now
        return []

    def leave(self, _: None, now: float) -> list[Any]:
        self.leaving = True
        self._join_at = None
        return self.core.handle(Leave(), now)

    def reissue(self, _: None, now: float) -> list[Any]:
        """Something in the record has changed."""
        page = self._issue(int(self._machine.wall_s() * 1000))
        return self.core.handle(RecordIssued(page.sequence), now)

    @property
    def has_census(self) -> bool:
        return len(self._census) > 0

    @property
    def has_gone(self) -> bool:
        return self.leaving and self.core.deadline is None

    @property
    def deadline(self) -> float | None:
        core = self.core.deadline
        if self._join_at is None:
            return core
        return self._join_at if core is None else min(core, self._join_at)

    def tick(self, _: None, now: float) -> list[Any]:
        if self._join_at is not None and self._join_at <= now:
            self._join(now)
        core = self.core.deadline
        return self.core.handle(Tick(), now) if core is not None and core <= now else []

    def _join(self, now: float) -> None:
        """Each seed until it has answered once; also later whoever it knew, when all of them are gone."""
        wanted = [address for address in self._seeds if address not in self._met]
        if len(self.core) == 1:
            wanted += [page.address for page in self.disk.book.pages.values() if page.peer != self.peer]
        if wanted:
            self._machine.call(self._luck.choice(wanted), self.offer())
        self._join_at = now + JOIN_PERIOD_S * self._luck.uniform(0.7, 1.3) * (1 if wanted else 10)

    def _issue(self, wall_ms: int) -> Page:
        """Above its own last one, and above what others say that was: a wiped disk has forgotten."""
        book = self.disk.book
        self.disk.sequence = max(self.disk.sequence, book.sequence_of(self.peer)) + 1
        self.disk.sequence = max(self.disk.sequence, wall_ms)
        page = book.issue(self.pen, self.disk.sequence, self._machine.address, wall_ms / 1000)
        book.keep(page, wall_ms / 1000)
        return page

    # -- what comes in

    def receive(self, datagram: Datagram, now: float) -> list[Any]:
        if datagram.to != self.peer:
            return []
        self._sources[datagram.sender] = datagram.source
        if len(self._sources) > SOURCES_MAX:
            self._sources.popitem(last=False)
        return self.core.handle(Received(datagram.sender, datagram.message), now)

    def asked(self, call: Call, now: float) -> list[Any]:
        """The other side of a push-pull: says what it knows, then learns."""
        self._machine.reply(call, self.offer())
        return self._learn(call.content, now)

    def answered(self, call: Call, now: float) -> list[Any]:
        effects = self._learn(call.content, now)
        self._met.add(self.disk.book.address_of(call.content.peer))
        return effects

    def offer(self) -> Offer:
        """All that it knows; what it thinks of the dead is in the suspicions."""
        if self.hides:
            return Offer(self.peer, (self.disk.book.pages[self.peer],), (self.core.claim,), ())
        believed = tuple(member.claim for member in self.core.members())
        pages = tuple(self.disk.book.pages.values())
        return Offer(self.peer, pages, (self.core.claim, *believed), tuple(self.core.suspicions()))

    def _learn(self, offer: Offer, now: float) -> list[Any]:
        book = self.disk.book
        own = book.pages[self.peer]
        book.merge(offer.pages, self._machine.wall_s())
        effects = []
        if book.pages[self.peer] is not own:
            effects += self.reissue(None, now)
        known = tuple(claim for claim in offer.claims if claim.peer in book.pages)
        return effects + self._take_offer(offer, known, now)

    def _take_offer(self, offer: Offer, claims: tuple[Claim, ...], now: float) -> list[Any]:
        return self.core.handle(Synced(offer.peer, claims, offer.suspicions), now)

    # -- what goes out

    def perform(self, effect: Any) -> None:
        if isinstance(effect, Send):
            address = self._address_of(effect.to)
            if address is not None:
                machine = self._machine
                machine.send(address, Datagram(self.peer, effect.to, machine.address, effect.message))
        elif isinstance(effect, Sync):
            address = self._address_of(effect.peer)
            if address is not None:
                self._machine.call(address, self.offer())

    def _address_of(self, peer: bytes) -> int | None:
        found = self.disk.book.address_of(peer)
        return self._sources.get(peer) if found is None else found

    # -- what it believes

    def beliefs(self) -> Iterable[Member]:
        return self.core.members()

    @property
    def claim(self) -> Claim:
        return self.core.claim

    def suspicions(self) -> Iterable[Suspicion]:
        return self.core.suspicions()


__all__ = ["NETWORK", "Changed", "Datagram", "Disk", "Host", "Member", "Membership", "Offer", "State"]
