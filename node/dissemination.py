"""Dissemination: what rides on this node's messages, and when it speaks of news alone.  PROTOCOL.md, section 15.

Pure; randomness is an argument.  Law: this node's own claim and what is held against the receiver go before the news.
(The name is of SWIM's paper, section 3.2; the news that wait are in `broadcasts`.)
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from node.broadcasts import Broadcasts
from node.claim import Suspicion, encoded_bytes
from node.member import State
from node.message import GOSSIP_ROOM_BYTES, Gossip

if TYPE_CHECKING:
    import random

    from node.claim import Item, PeerHash
    from node.member_table import MemberTable
    from node.outbox import Outbox
    from node.profile import Profile
    from node.suspicions import Suspicions
    from node.voice import Voice


class Dissemination:
    """Reads the table and what is held against its members, and changes neither."""

    __slots__ = ("_news", "_outbox", "_profile", "_random", "_suspicions", "_table", "_told_at", "_voice", "deadline")

    def __init__(
        self,
        table: MemberTable,
        suspicions: Suspicions,
        voice: Voice,
        outbox: Outbox,
        random: random.Random,
        profile: Profile,
    ) -> None:
        self._table = table
        self._suspicions = suspicions
        self._voice = voice
        self._outbox = outbox
        self._random = random
        self._profile = profile
        self._news = Broadcasts(profile.broadcasts_max)
        self._told_at: dict[PeerHash, float] = {}  # of the dead and the left: when one was told without having asked
        self.deadline = math.inf
        """When `tell_news` is due."""

    def add(self, item: Item) -> bool:
        """False: another one had to go before it was told often enough."""
        return self._news.add(item)

    def schedule(self, now: float) -> None:
        """There are news: they are told soon, unless that is coming anyway."""
        if self.deadline == math.inf and self._profile.gossip_fanout and self._table.active:
            self.deadline = now + self._random.random() * self._profile.gossip_period_s

    def clear(self) -> None:
        """Nothing of all that waits is told any more."""
        self._news = Broadcasts(self._profile.broadcasts_max)

    def clear_peer(self, peer: PeerHash, accusers: list[PeerHash]) -> None:
        """What those held against it is over, and told no more."""
        self._told_at.pop(peer, None)
        for accuser in accusers:
            self._news.discard_suspicion(peer, accuser)

    def tell_news(self, now: float) -> None:
        for peer in self._table.pick(self._profile.gossip_fanout):
            if len(self._news):
                self.tell(peer)
        waits = len(self._news) and self._table.active
        self.deadline = now + self._profile.gossip_period_s if waits else math.inf

    def tell(self, peer: PeerHash, *, own: bool = False) -> None:
        """A message of its own, which nobody answers."""
        self._outbox.send(Gossip(self.gossip_for(peer, own=own)), peer)

    def gossip_for(self, peer: PeerHash, *, own: bool = False, room_bytes: int = GOSSIP_ROOM_BYTES) -> tuple[Item, ...]:
        """As many items as fit.  This node's claim (`own`) and what is held against the peer go before the news."""
        urgent = self._notice_for(peer)
        if own or self._voice.left:
            urgent.insert(0, self._voice.claim)
        if not urgent and not len(self._news):
            return ()
        room_bytes -= sum(map(encoded_bytes, urgent))
        items_max = self._profile.items_max - len(urgent)
        members = self._table.active + 1
        news = self._news.take(room_bytes, items_max, members, self._profile.retransmit_multiplier)
        if not urgent:
            return tuple(news)
        return tuple(sorted([*urgent, *(item for item in news if item not in urgent)], key=_claims_first))

    def is_untold(self, peer: PeerHash, now: float) -> bool:
        """Heard from, yet thought dead or left, and not told so within this period: two such could go on for ever."""
        held = self._table.get(peer)
        if held is None or held.active:
            return False
        if now - self._told_at.get(peer, -math.inf) < self._profile.probe_period_s:
            return False
        self._told_at[peer] = now
        return True

    def _notice_for(self, peer: PeerHash) -> list[Item]:
        """The claim of it that is held here, and a suspicion: so it can refute, and sees a past it has forgotten."""
        held = self._table.get(peer)
        if held is None or held.state == State.ALIVE:
            return []
        if held.state == State.LEFT:
            return [held.claim]
        if held.state == State.DEAD:
            return [held.claim, self._suspicions.notice(peer)]
        if not self._profile.buddy:
            return []
        return [held.claim, self._suspicions.first_word(peer)]


def _claims_first(item: Item) -> bool:
    return isinstance(item, Suspicion)
