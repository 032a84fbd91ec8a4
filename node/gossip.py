"""Gossip: keeps membership and records as all others have them.  The driver of Membership: datagrams and push-pulls.

Laws: a datagram goes to the address in its receiver's record and nowhere else, so that a forged source reflects
nothing.  Nothing that a peer sends or fails to do ends the node.  `handle` is for any thread and waits for no network.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections import Counter, OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from node import address as addresses
from node import datagram, identity, log
from node.bridge import Inbox, in_thread
from node.claim import hash_of, id_of, verify_item
from node.claims import Claims
from node.greetings import GREETINGS_AT_ONCE_MAX, Greetings
from node.link import connect
from node.member import State
from node.membership import Membership
from node.membership_effect import Answered, Changed, Forgotten, Refusal, Refused, Send, Sync
from node.membership_event import Deaf, Doubt, Forget, Greet, Leave, Received, RecordIssued, Synced, Tick
from node.profile import LAN, Profile
from node.push_pull import PushPull
from node.rates import Rates
from node.reachable import Reachable
from protos import peers_pb2 as pb
from protos.errors import DeadlineExceeded, InvalidSignature, PeerLost, ShoalError, Unavailable
from protos.limits import ERROR_MESSAGE_CHARS_MAX
from protos.peers_pb2_grpc import PeersStub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from node.claim import Claim, PeerHash, Suspicion
    from node.identity import Identity
    from node.link import Link, Links
    from node.membership_effect import Effect
    from node.membership_event import Event
    from node.roster import Roster
    from node.udp import Udp
    from protos.ids import PeerId

SYNC_S: Final = 5.0
"""The deadline of each of a push-pull's two calls."""

DIAL_S: Final = 5.0
"""The deadline of a connection and its Hello, for a push-pull and for first contact."""

SYNCS_AT_ONCE_MAX: Final = 4
"""Push-pulls that this node has begun; each holds a thread for a few seconds at most."""

SYNCS_WAITING_MAX: Final = 16
"""Those that wait for their turn; what comes beyond it is dropped, and wanted again if it still matters."""

HOST_PER_S: Final = 1000.0
"""Datagrams a second that are looked at from one host: what a hundred nodes behind one address send, and 0.1 s of
verifying if all of them are forged."""

SENDER_PER_S: Final = 100.0
"""And of one node: it sends about ten in a busy second."""

SENDERS_MAX: Final = 4096
"""Hosts, and nodes, that are counted at once."""

STRANGER_FAILED_S: Final = 5.0
"""After a push-pull with a stranger that failed no other stranger is asked for so long, doubled with each further one
in a row up to STRANGER_FAILED_S_MAX: anybody can send a datagram, and name an address where nobody answers."""

STRANGER_FAILED_S_MAX: Final = 60.0

STRANGERS_MAX: Final = 64
"""Nodes that sent a datagram and whose record is not known: where they may be asked for it."""

PUSH_FANOUT: Final = 3
"""Push-pulls that are begun at once for what cannot wait."""

TOLD_MAX: Final = 100
"""Members beyond which the log's debug alone tells of a new one: who joins ten thousand must not log as many lines."""

ROUND_S: Final = 0.5
"""Between two looks at what only time brings: records that expire or are due, newcomers that have not answered."""

LEAVE_S: Final = 1.0
"""What it may take to tell others that this node leaves."""

PING_S: Final = 2.0
"""Within it a datagram must be answered by whoever wants to be called back."""


class Gossip:
    """One for a node.  `run` it after the server has started."""

    def __init__(
        self,
        roster: Roster,
        own: Identity,
        links: Links,
        udp: Udp,
        *,
        profile: Profile = LAN,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._roster = roster
        self._own = own
        self._links = links
        self._udp = udp
        self._clock = clock
        self._random = random.Random()  # noqa: S311  (for whom to ask, and when)
        self._lock = threading.RLock()
        self._core = Membership(
            own.public_key,
            roster.network.id,
            incarnation=int(wall() * 1000),
            sequence=roster.sequence,
            sign=own.sign,
            verify=self._verify,
            random=random.Random(),  # noqa: S311
            now=clock(),
            profile=profile,
        )
        self._claims = Claims()
        self._claims.put(self._core.claim)
        self._greet: OrderedDict[PeerHash, None] = OrderedDict()
        self._greetings = Greetings(self._random)
        self._strangers: OrderedDict[PeerHash, str] = OrderedDict()
        self._pings: dict[PeerHash, list[threading.Event]] = {}  # who waits for an answer of each
        self._proven: set[tuple[bytes, ...]] = (
            set()
        )  # under the lock: signatures that were verified before it was taken
        self._hosts: Rates[str] = Rates(HOST_PER_S, 2 * HOST_PER_S, SENDERS_MAX)
        self._senders: Rates[PeerHash] = Rates(SENDER_PER_S, 2 * SENDER_PER_S, SENDERS_MAX)
        self._spread = roster.revocations
        self._deaf = False
        self._sleeps_until = math.inf
        self._all_said = trio.Event()
        self._wake: Inbox[None] | None = None
        self._syncs: Inbox[PeerHash] | None = None
        self._stranger: Inbox[PeerHash] | None = None
        self._syncing: set[PeerHash] = set()
        self.push_pull = PushPull(roster, self, self._random)
        self.reachable = Reachable(roster.address)

    # --- from any thread -------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Takes an event in and does what follows, all but push-pulls, which tasks of `run` do."""
        with self._lock:
            for effect in self._core.handle(event, self._clock()):
                self._do(effect)
            if self._core.claim.rank > self._claims.rank_of(self._core.peer):
                self._claims.put(self._core.claim)
            self._greet_some()
            deadline = self._core.deadline
            is_early = deadline is None or deadline < self._sleeps_until
        if self._wake is not None and is_early:
            self._wake.put(None)

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        """A call to the peer failed: where it may be gone it is probed out of turn, and nothing else follows."""
        self._roster.failed(peer, error)
        if isinstance(error, PeerLost | DeadlineExceeded):
            self.handle(Doubt(hash_of(peer)))

    def set_deaf(self, deaf: bool) -> None:
        """Whether nobody can call this node, so that no answer to a datagram reaches it."""
        self._deaf = deaf
        self.handle(Deaf(deaf))

    def answers(self, peer: PeerId, timeout_s: float = PING_S) -> bool:
        """Whether the peer answers a datagram at the address in its record.  Blocks.  Raises Unavailable, where it is
        no member yet: nobody pings it then, so that its silence says nothing."""
        there = hash_of(peer)
        came = threading.Event()
        with self._lock:
            if self._core.member(there) is None:
                raise Unavailable(f"{peer[:8]} is no member here yet: ask again", retry_after_s=SYNC_S)
            waiting = self._pings.setdefault(there, [])
            waiting.append(came)
        try:
            for _ in range(2):  # one may be lost
                self.handle(Greet(there))
                if came.wait(timeout_s / 2):
                    return True
            return False
        finally:
            with self._lock:
                waiting.remove(came)
                if not waiting:
                    del self._pings[there]

    def own_claim(self) -> Claim:
        with self._lock:
            return self._core.claim

    def claim_digests(self) -> bytes:
        with self._lock:
            return self._claims.digests()

    def claims_of_differing(self, theirs: list[bytes]) -> tuple[list[int], list[Claim]]:
        with self._lock:
            differing = self._claims.differing(theirs)
            return differing, list(self._claims.of(differing, len(theirs)))

    def claims_newer(self, theirs: Sequence[Claim], buckets: Sequence[int], count: int) -> list[Claim]:
        if not buckets:
            return []
        with self._lock:
            return list(self._claims.newer(theirs, buckets, count))

    def suspicions(self) -> list[Suspicion]:
        with self._lock:
            return list(self._core.suspicions())

    def synced(self, peer: PeerId, claims: tuple[Claim, ...], suspicions: tuple[Suspicion, ...]) -> None:
        """Thousands of signatures are seconds of verifying, which is done without the lock: datagrams do not wait."""
        proven = self._prove(claims)
        with self._lock:
            self._proven = proven
            try:
                self.handle(Synced(hash_of(peer), claims, suspicions))
            finally:
                self._proven = set()

    def _prove(self, claims: Sequence[Claim]) -> set[tuple[bytes, ...]]:
        """What was signed of the claims that look new, up to the first that was not; the core refuses that one."""
        proven: set[tuple[bytes, ...]] = set()

        def prove(public_key: bytes, signature: bytes, domain: bytes, message: bytes) -> None:
            identity.verify(public_key, signature, domain, message)
            proven.add((public_key, signature, domain, message))

        with contextlib.suppress(InvalidSignature):
            for claim in claims:
                if claim.rank > self._claims.rank_of(claim.peer):
                    verify_item(prove, self._roster.network.id, claim)
        return proven

    def _verify(self, public_key: bytes, signature: bytes, domain: bytes, message: bytes) -> None:
        if (public_key, signature, domain, message) not in self._proven:
            identity.verify(public_key, signature, domain, message)

    # --- in trio ---------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Gossips until it is cancelled."""
        self._wake = Inbox(1)
        self._syncs = Inbox(SYNCS_WAITING_MAX)
        self._stranger = Inbox(1)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._udp.run, self._read)
            nursery.start_soon(self._tick, self._wake)
            nursery.start_soon(self._begin_syncs, self._syncs, nursery)
            nursery.start_soon(self._ask_strangers, self._stranger)
            nursery.start_soon(self._look_after)
            task_status.started()

    async def leave(self) -> None:
        """Tells others that this node leaves; they need not find out."""
        self.handle(Leave())
        with trio.move_on_after(LEAVE_S):
            await self._all_said.wait()

    async def join(self, address: str) -> PeerId:
        """First contact, for node.discovery: a push-pull with whoever is at host:port[#PEERID], and who that is."""
        return await in_thread(partial(self._join, address), abandon=True)

    async def _tick(self, wake: Inbox[None]) -> None:
        while True:
            with self._lock:  # a thread that brings the deadline forward must see until when this task sleeps
                deadline = self._core.deadline
                self._sleeps_until = math.inf if deadline is None else deadline
            if deadline is None:
                self._all_said.set()
            with trio.move_on_after(max(0.0, self._sleeps_until - self._clock())):
                await wake.get()
                continue
            self.handle(Tick())

    async def _begin_syncs(self, syncs: Inbox[PeerHash], nursery: trio.Nursery) -> None:
        free = trio.Semaphore(SYNCS_AT_ONCE_MAX)
        while True:
            await free.acquire()
            peer = await syncs.get()
            while peer in self._syncing:
                peer = await syncs.get()
            self._syncing.add(peer)
            nursery.start_soon(self._sync, peer, free)

    async def _sync(self, peer: PeerHash, free: trio.Semaphore) -> None:
        try:
            await in_thread(partial(self._guarded, partial(self._sync_with, peer)), abandon=True)
        finally:
            self._syncing.discard(peer)
            free.release()

    async def _ask_strangers(self, strangers: Inbox[PeerHash]) -> None:
        """One at a time, and beside the others' turns: whoever is asked in vain keeps no member waiting."""
        failed = 0
        while True:
            peer = await strangers.get()
            failed = 0 if await in_thread(partial(self._succeeds, peer), abandon=True) else failed + 1
            if failed:
                await trio.sleep(min(STRANGER_FAILED_S * 2.0 ** min(failed - 1, 16), STRANGER_FAILED_S_MAX))

    def _succeeds(self, peer: PeerHash) -> bool:
        """A push-pull with a stranger: whether it is one no more."""
        self._guarded(partial(self._sync_with, peer))
        return self._roster.record_of(id_of(peer)) is not None

    async def _look_after(self) -> None:
        """What only time brings."""
        while True:
            is_new, gone = self._roster.tick()
            if is_new:
                self.handle(RecordIssued(self._roster.sequence))
            for peer in gone:
                self.handle(Forget(hash_of(peer)))
            if self._roster.revocations != self._spread or (is_new and self._deaf):
                self._spread = self._roster.revocations
                self._push()
            for peer in self._greetings.due(self._roster.unanswered(), self._clock()):
                self._reach(hash_of(peer))
            # Spread, so that nodes that were started together do not stay in step.
            await trio.sleep(ROUND_S * self._random.uniform(0.75, 1.25))

    def _reach(self, peer: PeerHash) -> None:
        """A ping is cheaper than a push-pull, and its answer reaches only who can be called."""
        if not self._deaf:
            self.handle(Greet(peer))
        elif self._syncs is not None:
            self._syncs.put(peer)

    def _push(self) -> None:
        """What is new goes to a few at once.  Revocations: whoever is put out must not stay until a push-pull comes by
        itself; each of the few does the same, so that all have them within a few rounds.  The record of a node that
        is deaf: nobody can come and get it."""
        alive = sorted(self._roster.alive())
        for peer in self._random.sample(alive, min(PUSH_FANOUT, len(alive))):
            if self._syncs is not None:
                self._syncs.put(hash_of(peer))

    # --- effects, under the lock -----------------------------------------------------------------------------------

    def _do(self, effect: Effect) -> None:
        match effect:
            case Send():
                self._send(effect)
            case Sync(peer):
                is_known = self._roster.record_of(id_of(peer)) is not None
                syncs = self._syncs if is_known else self._stranger
                if syncs is not None:
                    syncs.put(peer)
            case Changed(peer, before, after, _, claim):
                self._claims.put(claim)
                self._roster.believe(id_of(peer), after)
                self._tell_change(peer, before, after)
            case Forgotten(peer):
                self._claims.drop(peer)
                self._roster.believe(id_of(peer), None)
            case Answered(peer, rtt_s):
                self._roster.answered(id_of(peer), rtt_s)
                for came in self._pings.get(peer, ()):
                    came.set()
            case Refused(peer, reason):
                self.counts[f"refused: {reason.value}"] += 1
                if reason is not Refusal.STRANGER:
                    log.get("gossip").debug("refused", peer=id_of(peer), why=reason.value)

    def _send(self, send: Send) -> None:
        record = self._roster.record_of(id_of(send.to))
        if record is None:
            return
        network, key = self._roster.network.id, self._own.public_key
        data = datagram.write(send.message, send.to, network, key, self._own.sign, self._roster.load_report())
        if self._udp.send(record.address, data):
            self.counts["datagrams sent"] += 1
            self.counts["bytes sent"] += len(data)

    def _tell_change(self, peer: PeerHash, before: State | None, after: State) -> None:
        if before == after:
            return
        if after is State.ALIVE:
            self._greet[peer] = None
        logger = log.get("gossip")
        is_small = State.SUSPECT in (before, after) and after is not State.DEAD
        tell = logger.debug if is_small or (before is None and len(self._core) > TOLD_MAX) else logger.info
        was = "unknown" if before is None else before.name.lower()
        tell("a peer is " + after.name.lower(), peer=id_of(peer), before=was)

    def _greet_some(self) -> None:
        """So that a newcomer's address counts soon, and need not wait for its turn to be probed."""
        for _ in range(min(GREETINGS_AT_ONCE_MAX, len(self._greet))):
            peer, _ = self._greet.popitem(last=False)
            for effect in self._core.handle(Greet(peer), self._clock()):
                self._do(effect)
        self._greet.clear()  # those that are left are greeted round by round

    # --- datagrams -------------------------------------------------------------------------------------------------

    def _read(self, data: bytes, host: str, port: int) -> None:
        """A bug that a datagram can reach must not end the node; it is told in the log."""
        try:
            self._take(data, host, port)
        except Exception as error:  # noqa: BLE001  (told, and counted)
            self.counts["dropped: it failed here"] += 1
            log.get("gossip").exception("a datagram failed here", error=str(error))

    def _take(self, data: bytes, host: str, port: int) -> None:
        now = self._clock()
        self.counts["datagrams read"] += 1
        self.counts["bytes read"] += len(data)
        if not self._hosts.admit(addresses.site(host), now):
            self.counts["dropped: too many of a host"] += 1
            return
        try:
            came = datagram.read(data, self._core.peer, self._roster.network.id, identity.verify)
        except ShoalError as error:
            self.counts[f"dropped: {error.code}"] += 1
            return
        if not self._senders.admit(came.sender, now):
            self.counts["dropped: too many of a node"] += 1
            return
        if self._roster.record_of(id_of(came.sender)) is None:
            self._remember_stranger(came.sender, host, port)
        elif came.load:
            self._roster.merge_load(came.load)
        self.handle(Received(came.sender, came.message))

    def _remember_stranger(self, peer: PeerHash, host: str, port: int) -> None:
        """Datagrams come from the port that takes calls.  Hello proves who is there before anything is said."""
        with self._lock:
            self._strangers[peer] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            self._strangers.move_to_end(peer)
            if len(self._strangers) > STRANGERS_MAX:
                self._strangers.popitem(last=False)

    # --- push-pulls, in threads ------------------------------------------------------------------------------------

    def _guarded(self, work: Callable[[], object]) -> None:
        """A bug that a peer can reach must not end the node; it is told in the log."""
        try:
            work()
        except ShoalError as error:
            self.counts["push-pulls failed"] += 1
            log.get("gossip").debug("a push-pull failed", code=error.code, error=error.message)
        except Exception as error:  # noqa: BLE001  (told, and counted as a failed one)
            log.get("gossip").exception("a push-pull failed here", error=str(error))

    def _sync_with(self, peer: PeerHash) -> None:
        record = self._roster.record_of(id_of(peer))
        with self._lock:
            address = record.address if record is not None else self._strangers.pop(peer, None)
        if address is not None:
            self._join(f"{address}#{id_of(peer)}")

    def _join(self, address: str) -> PeerId:
        """The link is closed again: among a thousand peers, whom one syncs with now and then, links would pile up."""
        link = connect(self._own, address, plaintext=self._links.plaintext, timeout_s=DIAL_S)
        try:
            if link.peer != self._roster.me:
                self._exchange(link)
                self._ask_to_be_called(link)
            return link.peer
        finally:
            link.close()

    def _exchange(self, link: Link) -> None:
        host = addresses.parse(link.address).host
        exchange = self.push_pull.begin(link.peer)
        reply = _sync_call(link, exchange.asked)
        second = self.push_pull.go_on(exchange, reply, host)
        last = None if second is None else _sync_call(link, second)
        self.push_pull.end(exchange, last, host)
        self.counts["push-pulls"] += 1
        record = self._roster.record_of(link.peer)
        if record is not None and record.address == link.address:
            self._roster.answered(link.peer)

    def _ask_to_be_called(self, link: Link) -> None:
        """Whether others reach this node only they can say."""
        if not self.reachable.wants(link.peer, self._clock()):
            return
        with contextlib.suppress(ShoalError):  # one that is busy says nothing
            reply = link.call(lambda channel: PeersStub(channel).DialBack, pb.DialBackRequest(), timeout_s=2 * DIAL_S)
            self.reachable.said(link.peer, reply.reached, reply.why[:ERROR_MESSAGE_CHARS_MAX], self._clock())


def _sync_call(link: Link, request: pb.SyncRequest) -> pb.SyncReply:
    return link.call(lambda channel: PeersStub(channel).Sync, request, timeout_s=SYNC_S)
