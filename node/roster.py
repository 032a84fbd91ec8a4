"""Roster: all that this node knows of its peers: records, loads, reach and health, and the views made of them.

Thread-safe, and waits for nobody: the network is in node.peers.  Law: a peer's word counts for itself only.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from coordinator import view
from coordinator.view import Health, Load, View
from node import log
from node.reach import Reach
from node.record import Held, Record, read, sign
from node.routing_table import Accepted, RoutingTable
from protos import inference_pb2
from protos import peers_pb2 as pb
from protos.errors import InvalidRecord, InvalidRequest, PeerLost, PermissionDenied, ShoalError, ShuttingDown
from protos.limits import PEERS_MESSAGE_BYTES_MAX, RECORDS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

    from coordinator.health import PeerHealth
    from node.hello import Caller
    from node.identity import Identity
    from node.link import Links
    from protos.ids import PeerId

RECORD_S = 600.0
"""How long an own record holds; a new one is issued at half of it."""

# In a message beside its records: the load, and what protobuf puts around each.
_SPARE_BYTES = 64 * 1024

_FOR_NODES = ("/shoal.v1.Stage/", "/shoal.v1.Door/", "/shoal.v1.Expert/")
_STATES = {Health.ALIVE: "alive", Health.SUSPECT: "suspect", Health.DEAD: "dead"}


@dataclass(frozen=True, slots=True)
class About:
    """What this node's record says beside what it holds.  `address`: host:port that others dial."""

    address: str
    certificate_sha256: bytes | None
    zone: str = ""
    owner: str = ""
    version: str = ""
    sessions_max: int = 0
    kv_bytes_max: int = 0


class Roster:
    """`load`: how busy this node is, asked at each exchange.  `clock` is monotonic, `wall` counts from 1970."""

    def __init__(
        self,
        identity: Identity,
        links: Links,
        health: PeerHealth,
        about: About,
        *,
        period_s: float = 1.0,
        load: Callable[[], pb.Load] = pb.Load,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self.me: PeerId = identity.peer
        self.address = about.address
        self._identity = identity
        self._links = links
        self._health = health
        self._own = _unissued(identity.public_key, about)
        self._load = load
        self._clock = clock
        self._wall = wall
        self._lock = threading.RLock()
        self._table = RoutingTable()
        self._reach = Reach(period_s)
        self._loads: dict[PeerId, Load] = {}
        self.publish(())

    def publish(self, held: Sequence[Held]) -> None:
        """From now on this node's record says that it holds this.  Raises InvalidRecord for more than fits."""
        with self._lock:
            self._issue(tuple(held), self._own.sequence + 1)

    def view(self, model_id: str) -> View:
        """Who holds what of a model.  Peers that never answered are left out until they do."""
        now = self._clock()
        with self._lock:
            records = {
                peer: _viewed(record, held)
                for peer, record in self._table.records().items()
                for held in record.held
                if held.model_id == model_id and (peer == self.me or self._reach.reached(peer))
            }
            return View(
                records=records,
                loads={peer: load for peer, load in self._loads.items() if peer in records},
                health={peer: self._state(peer, now) for peer in records if peer != self.me},
                rtt_s={peer: rtt for peer in records if (rtt := self._reach.rtt_s(peer)) is not None},
            )

    def status(self) -> list[inference_pb2.PeerStatus]:
        """Every peer whose record is known, this node first.  `bytes` is left to who has the manifest."""
        now = self._clock()
        with self._lock:
            records = self._table.records()
            others = sorted(peer for peer in records if peer != self.me)
            return [self._status(peer, records[peer], now) for peer in (self.me, *others)]

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        """A call to the peer failed."""
        now = self._clock()
        self._health.failed(peer, error, now)
        if peer != self.me and isinstance(error, PeerLost | ShuttingDown):
            with self._lock:
                if self._table.get(peer) is not None:
                    self._reach.suspect(peer, now)

    def heard(self, peer: PeerId) -> None:
        """The peer gave a sign of life."""
        now = self._clock()
        self._health.heard(peer, now)
        with self._lock:
            if self._table.get(peer) is not None and peer != self.me:
                self._reach.heard(peer, now)

    def permit(self, caller: Caller, method: str) -> None:
        """What nodes ask of each other is for nodes whose record is known here.  Raises PermissionDenied."""
        if method.startswith(_FOR_NODES) and self._table.get(caller.peer) is None:
            raise PermissionDenied(f"{caller.peer[:8]} is known here as no node: exchange records first")

    # --- for node.peers and node.peers_service ------------------------------------------------------------------

    def request(self, random: Random) -> pb.ExchangeRequest:
        return pb.ExchangeRequest(records=self._outgoing(random), load=self._load())

    def reply(self, random: Random) -> pb.ExchangeReply:
        return pb.ExchangeReply(records=self._outgoing(random), load=self._load())

    def admit(self, caller: PeerId, request: pb.ExchangeRequest) -> None:
        """Takes in what a caller sent, its own record among it.  Raises InvalidRecord if that is none."""
        self.merge(request.records, sender=caller)
        self.heard(caller)
        self.loaded(caller, request.load)

    def merge(self, signed: Sequence[pb.SignedRecord], sender: PeerId) -> bool:
        """Takes records in; whether something is new.  One that is refused is no reason to refuse the others.

        Raises InvalidRequest for more than a table holds, before any is looked at; InvalidRecord if none of them, nor
        an older one, makes the sender known.
        """
        if len(signed) > RECORDS_MAX:
            raise InvalidRequest(f"an exchange with {sender[:8]} has {len(signed)} records; at most {RECORDS_MAX}")
        refused: ShoalError | None = None
        news = False
        for one in signed:
            try:
                news |= self._take(one)
            except ShoalError as error:
                refused = error
                log.get("peers").debug("a record was refused", sender=sender, error=error.message)
        if self.record_of(sender) is None:
            raise refused or InvalidRecord(f"an exchange with {sender[:8]} brought no record of its own")
        return news

    def loaded(self, peer: PeerId, message: pb.Load) -> None:
        """How busy the peer says that it is."""
        with self._lock:
            if self._table.get(peer) is not None:
                self._loads[peer] = Load(message.queue, message.kv_bytes_free or None, message.tokens_per_s)

    def answered(self, peer: PeerId, rtt_s: float) -> None:
        """An exchange succeeded that began `rtt_s` ago: what failed since then it does not heal."""
        now = self._clock()
        self._health.heard(peer, now - rtt_s)
        with self._lock:
            if self._table.get(peer) is not None:
                self._reach.answered(peer, rtt_s, now)

    def missed(self, peer: PeerId, error: ShoalError) -> None:
        now = self._clock()
        with self._lock:
            if self._table.get(peer) is not None:
                self._reach.missed(peer, f"{error.code}: {error.message}", now)

    def record_of(self, peer: PeerId) -> Record | None:
        with self._lock:
            return self._table.get(peer)

    def is_dead(self, peer: PeerId) -> bool:
        with self._lock:
            return self._reach.state(peer) is Health.DEAD

    def tick(self) -> None:
        """What only time brings: expired records, and the own one's renewal."""
        with self._lock:
            for peer in self._table.expire(self._wall()):
                self._reach.forget(peer)
                self._loads.pop(peer, None)
                self._health.forget(peer)
                self._links.forget(peer)
            if self._own.expires_at_ms - self._wall() * 1000 < RECORD_S / 2 * 1000:
                self._issue(self._own.held, self._own.sequence + 1)

    def due(self, random: Random, busy: set[PeerId], count_max: int) -> list[PeerId]:
        """Whom to exchange records with now."""
        with self._lock:
            others = self._table.records().keys() - busy - {self.me}
            return self._reach.due(others, self._clock(), random, count_max)

    def _take(self, signed: pb.SignedRecord) -> bool:
        now = self._wall()
        with self._lock:
            if self._table.known(signed, now):
                return False
        verified = read(signed, int(now * 1000))  # takes long enough that nobody else should wait for it
        with self._lock:
            outcome = self._table.known(signed, now) or self._table.add(signed, verified, now)
            if not isinstance(outcome, Accepted):
                return False
            record = outcome.record
            if record.peer == self.me:
                # Of this node's last run, if the clock went back; or another process has a copy of the key.
                log.get("peers").warning("another record of this node's own key is newer", address=record.address)
                self._issue(self._own.held, record.sequence + 1)
                return True
            self._links.learn(record.peer, record.address, record.certificate_sha256)
            return True

    def _issue(self, held: tuple[Held, ...], sequence_min: int) -> None:
        now_ms = int(self._wall() * 1000)
        made = replace(
            self._own,
            held=held,
            sequence=max(now_ms, sequence_min),
            issued_at_ms=now_ms,
            expires_at_ms=now_ms + int(RECORD_S * 1000),
        )
        self._table.merge(sign(made, self._identity), self._wall())
        self._own = made

    def _outgoing(self, random: Random) -> list[pb.SignedRecord]:
        """The own record, and as many others as a message takes: if not all, then each time others."""
        with self._lock:
            signed = self._table.signed()
        chosen = [signed.pop(self.me)]
        room = PEERS_MESSAGE_BYTES_MAX - _SPARE_BYTES - chosen[0].ByteSize()
        others = list(signed.values())
        random.shuffle(others)
        for one in others:
            room -= one.ByteSize() + 8
            if room < 0:
                break
            chosen.append(one)
        return chosen

    def _state(self, peer: PeerId, now: float) -> Health:
        return max(self._reach.state(peer), self._health.standing(peer, now))

    def _status(self, peer: PeerId, record: Record, now: float) -> inference_pb2.PeerStatus:
        held = record.held[0] if record.held else Held("")
        score = self._health.score(peer)
        mine = peer == self.me
        return inference_pb2.PeerStatus(
            peer_id=peer,
            address=record.address,
            zone=record.zone,
            state="self" if mine else _STATES[self._state(peer, now)],
            rtt_s=self._reach.rtt_s(peer),
            model_id=held.model_id,
            first_layer=held.span.start,
            layers=len(held.span),
            experts=sum(mask.bit_count() for mask in held.experts.values()),
            queue=self._load().queue if mine else self._loads.get(peer, Load()).queue,
            age_s=0.0 if mine else self._reach.age_s(peer, now),
            last_error=score.last_error or self._reach.last_error(peer),
            calls_failed=score.calls_failed,
        )


def _unissued(public_key: bytes, about: About) -> Record:
    return Record(
        public_key=public_key,
        addresses=(about.address,),
        certificate_sha256=about.certificate_sha256,
        sequence=0,
        issued_at_ms=0,
        expires_at_ms=0,
        zone=about.zone,
        owner=about.owner,
        version=about.version,
        sessions_max=about.sessions_max,
        kv_bytes_max=about.kv_bytes_max,
    )


def _viewed(record: Record, held: Held) -> view.Record:
    return view.Record(
        address=record.address,
        zone=record.zone,
        layers=held.span,
        embed=held.embed,
        head=held.head,
        text=held.text,
        experts=held.experts,
    )
