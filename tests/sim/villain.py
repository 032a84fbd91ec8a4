"""Villain: what a malicious peer does with the powers that it really has.

Law: it signs with its own pen alone.  It hears all datagrams of the network, as somebody on the path would, and may
send any of them again; it speaks the protocol as a member; it keeps an honest process running underneath.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from node.claim import Claim, Suspicion, sign_claim, sign_suspicion
from node.message import Ack, Gossip, Ping
from protos.limits import INCARNATION_MAX
from tests.sim.host import NETWORK, Datagram, Offer
from tests.sim.network import Network, Watcher
from tests.sim.troubles import Malice

if TYPE_CHECKING:
    import random

    from tests.sim.book import Page
    from tests.sim.machine import Machine
    from tests.sim.notary import Notary, Pen

ACT_PERIOD_S = 0.25
HEARD_MAX = 200
FLOOD_DATAGRAMS = 40  # each period
INVENTED_MAX = 12  # identities that one villain shows with records
HIGHEST = INCARNATION_MAX  # what is above does not pass the reader of datagrams


class Wiretap(Watcher):
    """The last datagrams that anybody sent, and where to."""

    def __init__(self) -> None:
        self.heard: deque[tuple[int, Datagram]] = deque(maxlen=HEARD_MAX)
        self.claims: deque[Claim] = deque(maxlen=HEARD_MAX)
        self.pages: deque[Page] = deque(maxlen=HEARD_MAX)

    def sent(self, machine: Machine, address: int, datagram: Datagram) -> None:
        self.heard.append((address, datagram))
        self.claims.extend(item for item in datagram.message.gossip if isinstance(item, Claim))

    def stepped(self, machine: Machine, kind: str, content: Any, effects: list[Any]) -> None:
        if kind in ("asked", "answered") and content.content.pages:
            self.pages.append(content.content.pages[-1])


class Villain:
    def __init__(self, network: Network, machine: Machine, notary: Notary, tap: Wiretap, luck: random.Random) -> None:
        self._network = network
        self._machine = machine
        self._notary = notary
        self._tap = tap
        self._luck = luck
        self._invented: list[Pen] = []

    def begin(self, malice: Malice, until_s: float) -> None:
        act = {
            Malice.FORGE: self._forge,
            Malice.ACCUSE: self._accuse,
            Malice.REPLAY: self._replay,
            Malice.INFLATE: self._inflate,
            Malice.FLOOD: self._flood,
            Malice.INVENT: self._invent,
            Malice.HIDE: self._hide,
            Malice.BOAST: self._boast,
        }[malice]
        self._again(act, until_s)

    def _again(self, act: Any, until_s: float) -> None:
        host = self._machine.host
        if self._network.now >= until_s:
            if host is not None:
                host.hides = False
            return
        if host is not None and self._machine.is_well:
            act()
        self._network.agenda.after(ACT_PERIOD_S, self._again, act, until_s)

    # -- each kind

    def _forge(self) -> None:
        """A claim in another's name that its own pen signed, and a suspicion in another's name."""
        victim, claim = self._victim()
        if claim is None:
            return
        pen = self._pen()
        left = sign_claim(pen.sign, NETWORK, claim.public_key, claim.incarnation + 1, claim.sequence, left=True)
        blamed = sign_suspicion(pen.sign, NETWORK, claim.peer, claim.incarnation, self._victim()[1].public_key)
        book, wall_s = self._machine.host.disk.book, self._machine.wall_s()
        page = book.forge(pen, claim.public_key, claim.sequence + 1, self._machine.address, wall_s)
        self._tell(left, blamed)
        self._push((page,), (left,), (blamed,))
        self._speak_as(victim)

    def _accuse(self) -> None:
        """Its own word, properly signed: it may say so, and must not be believed outright."""
        _, claim = self._victim()
        if claim is not None:
            self._tell(sign_suspicion(self._pen().sign, NETWORK, claim.peer, claim.incarnation, self._pen().key))

    def _replay(self) -> None:
        for _ in range(5):
            if self._tap.heard:
                address, datagram = self._luck.choice(self._tap.heard)
                self._network.send(self._machine, address, datagram)
        if self._tap.claims:
            old = tuple(self._luck.choice(self._tap.claims) for _ in range(3))
            self._tell(*old)
            self._push(tuple(self._tap.pages), old, ())

    def _inflate(self) -> None:
        _, claim = self._victim()
        if claim is None:
            return
        higher = replace(claim, incarnation=self._luck.choice((claim.incarnation + 1, HIGHEST)))
        newer = replace(claim, sequence=claim.sequence + 1)
        gone = replace(claim, left=True)
        accused = Suspicion(claim.peer, HIGHEST, self._pen().key, bytes(64))
        self._tell(higher, newer, gone, accused)
        self._push((), (higher, newer, gone), (accused,))

    def _flood(self) -> None:
        address, peer = self._somebody()
        for _ in range(FLOOD_DATAGRAMS):
            kind = self._luck.choice((Ping, Ack))
            self._send(address, peer, kind(self._luck.getrandbits(63)))

    def _invent(self) -> None:
        """Identities with keys of their own: some show records by push-pull, others are only gossiped about."""
        pen = self._notary.pen(f"invented {self._machine.number} {self._luck.getrandbits(32)}")
        claim = sign_claim(pen.sign, NETWORK, pen.key, int(self._machine.wall_s() * 1000), 1)
        self._tell(claim)
        if len(self._invented) < INVENTED_MAX and self._luck.random() < 0.2:
            self._invented.append(pen)
            page = self._machine.host.disk.book.issue(pen, 1, self._machine.address, self._machine.wall_s())
            self._push((page,), (claim,), ())

    def _hide(self) -> None:
        assert self._machine.host is not None
        self._machine.host.hides = True

    def _boast(self) -> None:
        """About itself anything goes, also two different things at once."""
        pen, wall_ms = self._pen(), int(self._machine.wall_s() * 1000)
        incarnation = self._luck.choice((HIGHEST, wall_ms + self._luck.randrange(10**6)))
        claims = tuple(
            sign_claim(pen.sign, NETWORK, pen.key, incarnation, sequence, left=left)
            for sequence, left in ((1, False), (HIGHEST, False), (1, True))
        )
        self._luck.choice((self._tell, lambda *said: self._push((), said, ())))(*claims)

    # -- its means

    def _pen(self) -> Pen:
        assert self._machine.host is not None
        return self._machine.host.pen

    def _victim(self) -> tuple[bytes, Claim]:
        host = self._machine.host
        assert host is not None
        claims = [member.claim for member in host.beliefs()]
        claim = self._luck.choice(sorted(claims, key=lambda claim: claim.peer)) if claims else host.claim
        return claim.peer, claim

    def _somebody(self) -> tuple[int, bytes]:
        machine = self._luck.choice([one for one in self._network.machines if one.host is not None])
        assert machine.host is not None
        return machine.address, machine.host.peer

    def _tell(self, *items: Claim | Suspicion) -> None:
        address, peer = self._somebody()
        self._send(address, peer, Gossip(items))
        self._send(address, peer, Ping(self._luck.getrandbits(63), items))

    def _send(self, address: int, peer: bytes, message: Any) -> None:
        self._network.send(self._machine, address, Datagram(self._pen().peer, peer, self._machine.address, message))

    def _speak_as(self, victim: bytes) -> None:
        """Its own messages with another's address as their source: answers go to the record's address, not there."""
        address, peer = self._somebody()
        source = self._luck.randrange(len(self._network.machines))
        datagram = Datagram(self._pen().peer, peer, source, Ping(self._luck.getrandbits(63)))
        self._network.send(self._machine, address, datagram)

    def _push(self, pages: tuple[Page, ...], claims: tuple[Claim, ...], suspicions: tuple[Suspicion, ...]) -> None:
        """A push-pull is a conversation with the villain, whatever it brings."""
        assert self._machine.host is not None
        own = self._machine.host.offer()
        address, _ = self._somebody()
        offer = Offer(own.peer, (*own.pages[:1], *pages), (own.claims[0], *claims), suspicions)
        self._network.call(self._machine, address, offer)
