"""Nodes that gossip in one thread: real rosters and keys, a clock that the test sets, and no network."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import trio
import trio.testing

from coordinator.health import PeerHealth
from coordinator.view import Load
from node import datagram, record
from node.claim import Claim, PeerHash, Suspicion, hash_of, sign_claim, sign_suspicion
from node.gossip import Gossip
from node.identity import Identity
from node.link import Links
from node.membership_event import Tick
from node.network import Network, open_network
from node.profile import LAN, Profile
from node.record import Held, Record
from node.roster import About, Roster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from node.marks import Mark
    from node.message import Message
    from protos import peers_pb2 as pb
    from protos.ids import PeerId

_OPEN = open_network()
MODEL, ANOTHER = "a" * 64, "b" * 64
NOW = 1_800_000_000.0
HOLDS = (Held(MODEL, True, range(2), True, False, {0: 0b101}),)
QUIET = replace(LAN, gossip_fanout=0, dead_probe_period_s=0.0, pause_s=0.0)
"""Speaks only when it is spoken to, and never thinks that it stood still."""
WAIT_S = 20.0


class Clock:
    """Both clocks: they go together here."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


class ToyUdp:
    """Keeps what is sent."""

    port = 7645

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.takes = True

    def send(self, address: str, data: bytes) -> bool:
        if self.takes:
            self.sent.append((address, data))
        return self.takes

    async def run(
        self, read: Callable[[bytes, str, int], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self.read = read
        task_status.started()
        await trio.sleep_forever()


@dataclass(frozen=True)
class Person:
    """A peer that is known by what it signed alone."""

    identity: Identity
    address: str = "10.0.0.1:7645"
    network: Network = _OPEN
    incarnation: int = int(NOW * 1000)

    @classmethod
    def create(cls, address: str = "10.0.0.1:7645", network: Network | None = None) -> Person:
        return cls(Identity.create(), address, network or _OPEN)

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    @property
    def hash(self) -> PeerHash:
        return hash_of(self.peer)

    def record(self, sequence: int = 1, **changed: object) -> bytes:
        fields = {
            "public_key": self.identity.public_key,
            "addresses": (self.address,),
            "certificate_sha256": b"c" * 32,
            "sequence": sequence,
            "issued_at_ms": int(NOW * 1000),
            "expires_at_ms": int(NOW * 1000) + 3_600_000,
            "held": HOLDS,
            "network": self.network.id,
        } | changed
        return record.sign(Record(**fields), self.identity)

    def claim(self, above: int = 0, sequence: int = 1, *, left: bool = False) -> Claim:
        return sign_claim(
            self.identity.sign,
            self.network.id,
            self.identity.public_key,
            self.incarnation + above,
            sequence,
            left=left,
        )

    def suspicion(self, of: Person, above: int = 0) -> Suspicion:
        return sign_suspicion(
            self.identity.sign, self.network.id, of.hash, of.incarnation + above, self.identity.public_key
        )

    def datagram(self, to: PeerId, message: Message, load: bytes = b"") -> bytes:
        return datagram.write(message, hash_of(to), self.network.id, self.identity.public_key, self.identity.sign, load)


class One:
    """A node without a network around it."""

    def __init__(
        self,
        clock: Clock,
        *,
        identity: Identity | None = None,
        network: Network | None = None,
        grant: bytes = b"",
        held: Sequence[Held] = HOLDS,
        address: str = "",
        zone: str = "z",
        marks: Mapping[PeerId, Mark] | None = None,
        profile: Profile = QUIET,
    ) -> None:
        self.identity = identity or Identity.create()
        self.links = Links(self.identity)
        self.health = PeerHealth()
        self.load = Load(queue=3)
        self.clock = clock
        self.address = address or f"h{self.identity.peer[:4]}:7645"
        self.roster = Roster(
            self.identity,
            network or open_network(),
            self.links,
            self.health,
            About(self.address, b"c" * 32, zone=zone, grant=grant),
            held,
            marks=marks or {},
            load=lambda: self.load,
            clock=clock,
            wall=clock,
        )
        self.udp = ToyUdp()
        self.gossip = Gossip(self.roster, self.identity, self.links, self.udp, profile=profile, clock=clock, wall=clock)

    @property
    def peer(self) -> PeerId:
        return self.roster.me

    @property
    def hash(self) -> PeerHash:
        return hash_of(self.peer)

    def knows(self, *people: Person) -> None:
        """Their records and claims, as one push-pull brings them."""
        for person in people:
            self.roster.merge(person.record(), f"from {person.peer}")
        self.gossip.synced(people[0].peer, tuple(person.claim() for person in people), ())

    def hears(self, person: Person, message: Message, host: str = "10.0.0.1", port: int = 7645) -> None:
        """A datagram of that peer."""
        self.gossip._read(person.datagram(self.peer, message), host, port)

    def sent(self) -> list[tuple[str, Message]]:
        """Where datagrams went since the last time, and what they say."""
        taken, self.udp.sent = self.udp.sent, []
        return [(address, read(data)) for address, data in taken]

    def state(self, peer: PeerId) -> object:
        member = self.gossip._core.member(hash_of(peer))
        return None if member is None else member.state


def read(data: bytes) -> Message:
    """What a datagram says, whoever it is for."""
    signed = datagram.pb.Datagram.FromString(data)
    body = datagram.pb.DatagramBody.FromString(signed.body)
    return datagram.read(data, PeerHash(body.to), body.network, lambda *_: None).message


def exchange(asker: One, answerer: One) -> list[pb.SyncRequest | pb.SyncReply]:
    """A whole push-pull: all its messages."""
    asking, answering = asker.gossip.push_pull, answerer.gossip.push_pull
    begun = asking.begin(answerer.peer)
    first = answering.answer(asker.peer, "asker", begun.asked)
    second = asking.go_on(begun, first, "answerer")
    last = None if second is None else answering.answer(asker.peer, "asker", second)
    asking.end(begun, last, "answerer")
    return [message for message in (begun.asked, first, second, last) if message is not None]


def tick_until(one: One, until: float = math.inf, *, steps: int = 10_000) -> None:
    """What time brings, with nobody answering."""
    for _ in range(steps):
        deadline = one.gossip._core.deadline
        if deadline is None or deadline > until:
            break
        one.clock.now = max(one.clock.now, deadline)
        one.gossip.handle(Tick())
    if until < math.inf:
        one.clock.now = max(one.clock.now, until)


def of(messages: Iterable[tuple[str, Message]], kind: type) -> list[tuple[str, Message]]:
    return [(address, message) for address, message in messages if isinstance(message, kind)]


def table(one: One) -> dict[bytes, object]:
    return {member.claim.peer: member for member in one.gossip._core.members()}


class Virtual(Clock):
    """trio's clock, which the test lets jump."""

    def __call__(self) -> float:
        return NOW + trio.current_time() - self.begins

    def __init__(self) -> None:
        self.begins = trio.current_time()


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.0))


async def eventually(holds: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_S):
        while not holds():  # noqa: ASYNC110  (threads do it, and tell nobody)
            await trio.sleep(0.001)
