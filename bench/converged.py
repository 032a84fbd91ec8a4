"""Many virtual nodes that know each other from the start, and what is measured of them.

Law: all share one census and one book of addresses, and a push-pull carries what differs from the census, as the real
one carries what differs by digest.  So memory and time are those of differences, not of n squared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from node.census import Census
from node.claim import sign_claim
from node.member import State
from node.membership_effect import Changed
from tests.sim import dice
from tests.sim.book import Book
from tests.sim.host import NETWORK, Disk, Host, Offer
from tests.sim.links import Links, Quality
from tests.sim.network import EPOCH_S, Network, Watcher
from tests.sim.notary import Notary
from tests.sim.wire import datagram_bytes

if TYPE_CHECKING:
    from node.profile import Profile
    from tests.sim.host import Datagram
    from tests.sim.machine import Machine
    from tests.sim.network import Call

# A datagram of IPv4 has so much in front of it; the tables count payload and headers.
HEADER_BYTES = 28


class ConvergedHost(Host):
    """A push-pull carries only what differs from the census; a newcomer, who has none, gets all."""

    def asked(self, call: Call, now: float) -> list[Any]:
        if call.process.has_census:
            return super().asked(call, now)
        self._machine.reply(call, super().offer())
        return self._learn(call.content, now)

    def offer(self) -> Offer:
        differing = tuple(member.claim for _, member in self.core.differences() if member is not None)
        return Offer(self.peer, (), (self.core.claim, *differing), tuple(self.core.suspicions()))

    def _learn(self, offer: Offer, now: float) -> list[Any]:
        return self._take_offer(offer, offer.claims, now)


@dataclass(slots=True)
class Meter(Watcher):
    """Deaths that were concluded, and what was sent, while `counts`."""

    counts: bool = False
    datagrams: int = 0
    sent_bytes: int = 0
    slow: frozenset[int] = frozenset()
    number_of: dict[bytes, int] = field(default_factory=dict)
    died_s: dict[bytes, float] = field(default_factory=dict)
    concluded_s: dict[bytes, dict[int, float]] = field(default_factory=dict)  # by which node
    false_about_well: int = 0  # live, not slow
    false_among_well: int = 0  # and the one who was wrong was not slow either
    false_about_slow: int = 0

    def sent(self, machine: Machine, address: int, datagram: Datagram) -> None:
        if self.counts:
            self.datagrams += 1
            self.sent_bytes += datagram_bytes(datagram.message) + HEADER_BYTES

    def stepped(self, machine: Machine, kind: str, content: Any, effects: list[Any]) -> None:
        for effect in effects:
            if type(effect) is Changed and effect.after is State.DEAD:
                self._dead(machine, effect.peer)

    def _dead(self, machine: Machine, peer: bytes) -> None:
        if peer in self.died_s:
            self.concluded_s[peer].setdefault(machine.number, machine.now)
        elif self.counts and self.number_of[peer] in self.slow:
            self.false_about_slow += 1
        elif self.counts:
            self.false_about_well += 1
            self.false_among_well += machine.number not in self.slow


class Converged:
    """`nodes` of them, at time 0; the first `slow` are blocked for `blocked_s` and open for `open_s` on average."""

    def __init__(
        self,
        nodes: int,
        quality: Quality,
        profile: Profile,
        seed: int,
        *,
        slow: int = 0,
        blocked_s: float = 0.0,
        open_s: float = 1.0,
    ) -> None:
        self.notary = Notary()
        self.meter = Meter(slow=frozenset(range(slow)))
        self.network = Network(Links(seed, quality), (self.meter,))
        self.profile = profile
        self.seed = seed
        self.luck = dice.stream(seed, "bench")
        self.book = Book(self.notary.verify)
        pens = [self.notary.pen(f"bench {number}") for number in range(nodes)]
        wall_ms = int(EPOCH_S * 1000)
        self.census = Census(sign_claim(pen.sign, NETWORK, pen.key, wall_ms, wall_ms) for pen in pens)
        for pen in pens:
            self.add(pen, self.census)
        for number in range(slow):
            self.network.machines[number].slow_down(dice.stream(seed, "slow", number), blocked_s, open_s)

    def add(self, pen: Any, census: Census, seeds: tuple[int, ...] = ()) -> Machine:
        machine = self.network.add()
        luck = dice.stream(self.seed, "node", machine.number)
        self.meter.number_of[pen.peer] = machine.number
        disk = Disk(0, self.book)
        host = ConvergedHost(pen, self.notary, luck, disk=disk, profile=self.profile, census=census, seeds=seeds)
        machine.start(host)
        return machine

    def crash(self, number: int) -> bytes:
        machine = self.network.machines[number]
        host = self.network.stop(machine)
        assert host is not None
        self.meter.died_s[host.peer] = self.network.now
        self.meter.concluded_s[host.peer] = {}
        return host.peer

    def run_for(self, span_s: float) -> None:
        self.network.agenda.run_until(self.network.now + span_s)

    @property
    def well(self) -> list[int]:
        """Live ones that are not slow."""
        return [machine.number for machine in self.network.machines if machine.host is not None and not machine.slow]
