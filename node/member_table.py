"""The table of members: a node's differences from a census, and whom to probe or tell next.

Pure; randomness is an argument.  Law: the census is shared and never changes; memory is that of the differences, and a
round of probes visits every member that was there when it began exactly once.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from node.member import Member, State
from node.probe_order import ProbeOrder
from node.urn import Urn

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator

    from node.census import Census
    from node.claim import PeerHash

# Places tried at random that hold somebody active, on average, for each one wanted and for two more: one pick in 10^5
# finds too few.  Where it is as cheap to go through all of them, that is done, in an order by chance.
_TRIES = 4


class MemberTable:
    """Rows by peer, all but the node's own.  `alive` and `suspect` ones are active; the others are tombstones."""

    __slots__ = ("_census", "_counts", "_dead", "_holes", "_late", "_living", "_newcomers", "_order", "_own", "_places",
                 "_random", "_rows", "_step", "_tombstones")  # fmt: skip

    def __init__(self, own: PeerHash, census: Census, random: random.Random) -> None:
        self._own = own
        self._census = census
        self._random = random
        self._rows: dict[PeerHash, Member | None] = {}  # over the census; None: forgotten
        self._counts = [0] * len(State)
        self._counts[State.ALIVE] = len(census) - (own in census)
        self._dead: dict[PeerHash, None] = {}
        self._tombstones: dict[PeerHash, float] = {}  # when each is forgotten, the oldest first
        self._newcomers: list[PeerHash | None] = []  # who is in no census; None: a hole, until the next round
        self._places: dict[PeerHash, int] = {}  # of the newcomers
        self._holes: list[int] = []  # places that a newcomer can have
        self._living: Urn[PeerHash] = Urn()  # the active newcomers, so that tombstones hide nobody who lives
        self._late: Urn[PeerHash] = Urn()  # who came since the round began
        self._order = ProbeOrder(len(census), random)
        self._step = 0

    def get(self, peer: PeerHash) -> Member | None:
        try:
            return self._rows[peer]
        except KeyError:
            return None if peer == self._own else self._census.get(peer)

    @property
    def size(self) -> int:
        """Rows, tombstones too."""
        return sum(self._counts)

    @property
    def active(self) -> int:
        return self._counts[State.ALIVE] + self._counts[State.SUSPECT]

    @property
    def tombstones(self) -> int:
        return len(self._tombstones)

    def put(self, peer: PeerHash, member: Member, forget_at: float) -> None:
        """A new or changed row.  `forget_at` counts for one that has just become a tombstone."""
        before = self.get(peer)
        self._rows[peer] = member
        self._counts[member.state] += 1
        if before is None:
            self._arrive(peer)
        else:
            self._counts[before.state] -= 1
        if member.active:
            self._tombstones.pop(peer, None)
            if peer not in self._census:
                self._living.add(peer)
        elif before is None or before.active:
            self._tombstones[peer] = forget_at
            self._living.discard(peer)
        if member.state == State.DEAD:
            self._dead[peer] = None
        else:
            self._dead.pop(peer, None)

    def remove(self, peer: PeerHash) -> None:
        """It must be there."""
        before = self.get(peer)
        assert before is not None
        self._counts[before.state] -= 1
        self._tombstones.pop(peer, None)
        self._dead.pop(peer, None)
        self._living.discard(peer)
        self._late.discard(peer)
        if peer in self._census:
            self._rows[peer] = None
            return
        del self._rows[peer]
        place = self._places.pop(peer)
        self._newcomers[place] = None
        self._holes.append(place)

    def oldest_tombstone(self) -> tuple[PeerHash, float] | None:
        """The one that is forgotten next, and when."""
        return next(iter(self._tombstones.items()), None)

    def random_dead(self) -> PeerHash | None:
        if not self._dead:
            return None
        return next(itertools.islice(self._dead, self._random.randrange(len(self._dead)), None))

    def differences(self) -> Iterator[tuple[PeerHash, Member | None]]:
        return iter(self._rows.items())

    def rows(self) -> Iterator[Member]:
        for peer, member in zip(self._census.peers, self._census.members, strict=True):
            if peer not in self._rows and peer != self._own:
                yield member
        yield from (member for member in self._rows.values() if member is not None)

    def next_to_probe(self) -> PeerHash | None:
        """The next active one of this round, or of the next.  None: there is none at all."""
        if not self.active:
            return None
        while True:
            peer = self._next()
            if peer is not None and self._is_active(peer):
                return peer

    def pick(self, count: int, *avoided: PeerHash) -> list[PeerHash]:
        """So many different active ones at random, or all where there are fewer."""
        picked: list[PeerHash] = []
        if not count or not self.active:
            return picked
        old = len(self._census)
        for place in self._random_places(old + len(self._living), count):
            peer = self._census.peers[place] if place < old else self._living[place - old]
            if peer in picked or peer in avoided or not self._is_active(peer):
                continue
            picked.append(peer)
            if len(picked) == count:
                break
        return picked

    def _random_places(self, places: int, count: int) -> Iterable[int]:
        """The more of the census are dead, the more tries."""
        tries = _TRIES * (count + 2) * places // self.active
        if tries >= places:
            return self._random.sample(range(places), places)
        return (self._random.randrange(places) for _ in range(tries))

    def _is_active(self, peer: PeerHash) -> bool:
        member = self.get(peer)
        return member is not None and member.active

    def _at(self, place: int) -> PeerHash | None:
        old = len(self._census)
        return self._census.peers[place] if place < old else self._newcomers[place - old]

    def _next(self) -> PeerHash | None:
        """Whoever came late goes between the others, so that its place in the round is as random as theirs."""
        left = self._order.n - self._step
        late = len(self._late)
        if late and self._random.randrange(left + late) < late:
            return self._late.take(self._random.randrange(late))
        if not left:
            self._begin_round()
        self._step += 1
        return self._at(self._order[self._step - 1])

    def _begin_round(self) -> None:
        if self._holes:
            self._newcomers = [peer for peer in self._newcomers if peer is not None]
            self._places = {peer: place for place, peer in enumerate(self._newcomers) if peer is not None}
            self._holes.clear()
        self._late.clear()
        self._order = ProbeOrder(len(self._census) + len(self._newcomers), self._random)
        self._step = 0

    def _arrive(self, peer: PeerHash) -> None:
        if peer not in self._census:
            self._take_place(peer)
        self._late.add(peer)

    def _take_place(self, peer: PeerHash) -> None:
        if self._holes:
            place = self._holes.pop()
            self._newcomers[place] = peer
        else:
            place = len(self._newcomers)
            self._newcomers.append(peer)
        self._places[peer] = place
