"""A few memberships in one thread: keys that are numbers, signatures that are hashes, a clock that the test sets."""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from dataclasses import replace
from typing import TYPE_CHECKING

from node.census import EMPTY, Census
from node.claim import Claim, PeerHash, Sign, Suspicion, peer_hash, sign_claim, sign_suspicion
from node.membership import Membership
from node.membership_effect import Effect, Send, Sync
from node.membership_event import Event, Received, Synced, Tick
from node.message import Ack, Ping
from node.profile import LAN, Profile
from protos.errors import InvalidSignature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from node.member import State

NETWORK = b"n" * 32
START = 1_800_000_000_000
QUIET = replace(LAN, gossip_fanout=0, dead_probe_period_s=0.0, pause_s=0.0)


def key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def peer(number: int) -> PeerHash:
    return peer_hash(key(number))


def signer(public_key: bytes) -> Sign:
    return lambda domain, message: hashlib.sha512(public_key + domain + message).digest()


def verify(public_key: bytes, signature: bytes, domain: bytes, message: bytes) -> None:
    if hashlib.sha512(public_key + domain + message).digest() != signature:
        raise InvalidSignature("forged")


def claim(number: int, incarnation: int = START, sequence: int = 1, *, left: bool = False) -> Claim:
    return sign_claim(signer(key(number)), NETWORK, key(number), incarnation, sequence, left=left)


def suspicion(subject: int, accuser: int, incarnation: int = START) -> Suspicion:
    return sign_suspicion(signer(key(accuser)), NETWORK, peer(subject), incarnation, key(accuser))


def census(count: int) -> Census:
    """Peers 0 to count - 1."""
    return Census(claim(number) for number in range(count))


def core(
    number: int = 0, known: Census = EMPTY, *, seed: int = 0, profile: Profile = LAN, **changed: object
) -> Membership:
    settings = {"incarnation": START, "sequence": 1, "verify": verify, "now": 0.0} | changed
    return Membership(
        key(number),
        NETWORK,
        sign=signer(key(number)),
        random=random.Random(f"{seed}-{number}"),
        profile=profile,
        census=known,
        **settings,
    )


def sent(effects: Iterable[Effect], kind: type) -> list[Send]:
    return [effect for effect in effects if isinstance(effect, Send) and isinstance(effect.message, kind)]


def of(effects: Iterable[Effect], kind: type) -> list[Effect]:
    return [effect for effect in effects if isinstance(effect, kind)]


class Shoal:
    """Nodes that reach each other in a millisecond, unless `cut(from, to)` says otherwise."""

    def __init__(self, count: int, *, profile: Profile = LAN, seed: int = 0) -> None:
        known = census(count)
        self.now = 0.0
        self.nodes = {peer(n): core(n, known, seed=seed, profile=profile) for n in range(count)}
        self.stopped: set[PeerHash] = set()
        self.cut: Callable[[PeerHash, PeerHash], bool] = lambda _from, _to: False
        self.effects: list[tuple[float, PeerHash, Effect]] = []
        self._serial = itertools.count()
        self._agenda: list[tuple[float, int, PeerHash, Event]] = []

    def __getitem__(self, number: int) -> Membership:
        return self.nodes[peer(number)]

    def state(self, of_whom: int, at: int) -> State | None:
        member = self[at].member(peer(of_whom))
        return None if member is None else member.state

    def stop(self, number: int) -> None:
        self.stopped.add(peer(number))

    def tell(self, number: int, event: Event) -> None:
        self._do(peer(number), event)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            ticks = [(n.deadline, p) for p, n in self.nodes.items() if p not in self.stopped and n.deadline is not None]
            tick_at, ticking = min(ticks, default=(until, None))
            if min(tick_at, self._agenda[0][0] if self._agenda else until) >= until:
                break
            if self._agenda and self._agenda[0][0] <= tick_at:
                self.now, _, ticking, event = heapq.heappop(self._agenda)
            else:
                self.now, event = max(self.now, tick_at), Tick()
            if ticking is not None and ticking not in self.stopped:
                self._do(ticking, event)
        self.now = until

    def _do(self, who: PeerHash, event: Event) -> None:
        for effect in self.nodes[who].handle(event, self.now):
            self.effects.append((self.now, who, effect))
            if isinstance(effect, Send) and effect.to in self.nodes and not self.cut(who, effect.to):
                self._later(effect.to, Received(who, effect.message))
            elif isinstance(effect, Sync) and self._meet(who, effect.peer):
                self._later(who, self.push(effect.peer))
                self._later(effect.peer, self.push(who))

    def _meet(self, one: PeerHash, other: PeerHash) -> bool:
        return other in self.nodes and other not in self.stopped and not (self.cut(one, other) or self.cut(other, one))

    def push(self, number_or_peer: PeerHash) -> Synced:
        """What that node has for a push-pull."""
        node = self.nodes[number_or_peer]
        claims = (node.claim, *(member.claim for member in node.members()))
        return Synced(number_or_peer, claims, tuple(node.suspicions()))

    def _later(self, who: PeerHash, event: Event) -> None:
        heapq.heappush(self._agenda, (self.now + 0.001, next(self._serial), who, event))


def probe(node: Membership) -> tuple[float, Send]:
    """Ticks until the node pings: when, and what."""
    while True:
        now = node.deadline
        assert now is not None
        pings = sent(node.handle(Tick(), now), Ping)
        if pings:
            return now, pings[0]


def tick_until(node: Membership, until: float) -> list[object]:
    effects: list[object] = []
    while node.deadline is not None and node.deadline <= until:
        effects += node.handle(Tick(), node.deadline)
    return effects


def answered_until(node: Membership, until: float) -> list[object]:
    """Ticks, while all that is pinged answers at once."""
    effects: list[object] = []
    while node.deadline is not None and node.deadline <= until:
        now = node.deadline
        done = node.handle(Tick(), now)
        for ping in sent(done, Ping):
            done += node.handle(Received(ping.to, Ack(ping.message.nonce)), now)
        effects += done
    return effects


def state(node: Membership, number: int) -> State | None:
    member = node.member(peer(number))
    return None if member is None else member.state


def table(node: Membership) -> tuple[object, ...]:
    return (node.claim, sorted(map(str, node.members())), sorted(map(str, node.suspicions())), node.health)
