"""Roster: all that this node knows of its peers: records, loads, states, distances and health, and the views made of
them.

Thread-safe, and waits for nobody: the network is in node.gossip.  Law: a peer's word counts for itself only, and an
address counts once the peer has answered there.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from coordinator import view
from coordinator.islands import Place, island_of, islands
from coordinator.view import Health, Load, View
from node import address as addresses
from node import grant as grants
from node import load_report, log
from node.distance import Distances
from node.issuer import Issuer
from node.load_report import LoadReport, LoadReports
from node.member import State
from node.record import Held, Record, sign
from node.routing_table import Accepted, RoutingTable
from protos import inference_pb2
from protos.errors import GrantRevoked, PermissionDenied, ShoalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from coordinator.health import PeerHealth
    from node.hello import Caller
    from node.identity import Identity
    from node.link import Links
    from node.marks import Mark
    from node.network import Network
    from node.reconcile import Digest
    from protos.ids import PeerId

LOAD_S = 0.5
"""A signed report of this node's load is given out for so long; then it is made anew."""

_FOR_NODES = ("/shoal.v1.Stage/", "/shoal.v1.Door/", "/shoal.v1.Expert/", "/shoal.v1.Peers/DialBack")
_HEALTH = {
    State.ALIVE: Health.ALIVE,
    State.SUSPECT: Health.SUSPECT,
    State.DEAD: Health.DEAD,
    State.LEFT: Health.DEAD,
}


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
    grant: bytes = b""


class Roster:
    """`load`: how busy this node is.  `clock` is monotonic, `wall` counts from 1970."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        links: Links,
        health: PeerHealth,
        about: About,
        held: Sequence[Held] = (),
        *,
        marks: Mapping[PeerId, Mark] = MappingProxyType({}),
        load: Callable[[], Load] = Load,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Raises InvalidGrant and its kin for a grant that is none, and InvalidRecord for more than fits a record."""
        self.me: PeerId = identity.peer
        self.address = about.address
        self.network = network
        self.on_forgotten: Callable[[PeerId], None] = lambda _: None
        """Told, under the lock, whose record is known no longer.  It must not wait."""
        self._identity = identity
        self._links = links
        self._health = health
        self._load = load
        self._clock = clock
        self._wall = wall
        self._lock = threading.RLock()
        self._table = RoutingTable(network, marks=marks)
        self._loads = LoadReports(network)
        self._distances = Distances()
        self._states: dict[PeerId, State] = {}
        self._heard_at: dict[PeerId, float] = {}
        self._answered: dict[PeerId, str] = {}  # and where
        self._islands: list[frozenset[PeerId]] = []
        self._report: tuple[float, bytes] | None = None
        self._held = tuple(held)
        self._offers = True
        self._refused: ShoalError | None = None
        self._own = _unissued(identity.public_key, network, about, self._held, marks)
        self._issuer = Issuer(self._own, ends_at_ms=_grant_end_ms(about.grant, network, wall))
        self._issue(self._wall())

    # --- for whoever plans and calls ------------------------------------------------------------------------------

    def publish(self, held: Sequence[Held]) -> None:
        """From now on this node's record says that it holds this; the next `tick` that may issues it."""
        with self._lock:
            self._held = tuple(held)
            self._say()

    def offer(self, offers: bool) -> None:
        """Whether others may rely on what this node holds.  If not, its record says that it holds nothing, and in its
        own views it is a stage only where no other stage would have to call it."""
        with self._lock:
            self._offers = offers
            self._say()

    def view(self, model_id: str) -> View:
        """Who holds what of a model.  Peers that never answered this node are left out until they do."""
        now = self._clock()
        with self._lock:
            table = self._table.records()
            records = {
                peer: _viewed(table[peer], held)
                for peer, held in self._table.held(model_id).items()
                if peer != self.me and self._is_usable(peer)
            }
            for held in self._held:
                if held.model_id == model_id:
                    records[self.me] = _viewed(self._own, held if self._offers else _callable_by_none(held))
            loads = {peer: load for peer in records if (load := self._load_of(peer, now)) is not None}
            return View(
                records=records,
                loads=loads,
                health={peer: self._health_of(peer, now) for peer in records if peer != self.me},
                rtt_s={peer: rtt for peer in records if (rtt := self._distances.smoothed_s(peer)) is not None},
            )

    def islands(self) -> list[frozenset[PeerId]]:
        """Which peers are near each other, this node among them: by its own round-trip times and all zones."""
        with self._lock:
            places = {self.me: Place(0.0, self._own.zone)} | {
                peer: Place(self._distances.least_s(peer), record.zone)
                for peer, record in self._table.records().items()
                if peer != self.me and self._is_usable(peer)
            }
            self._islands = islands(places, self._islands)
            return self._islands

    def status(self, size: Callable[[Held], int] = lambda _: 0) -> list[inference_pb2.PeerStatus]:
        """Every peer whose record is known, this node first.  `size`: the bytes of what is held, for who has the
        manifest."""
        now = self._clock()
        home = island_of(self.me, self.islands())
        with self._lock:
            records = {**self._table.records(), self.me: replace(self._own, held=self._held)}
            others = sorted(peer for peer in records if peer != self.me)
            found = [self._status(peer, records[peer], now) for peer in (self.me, *others)]
        for status, peer in zip(found, (self.me, *others), strict=True):
            status.island = "home" if peer in home else ""
            status.bytes = sum(size(held) for held in records[peer].held[:1])
        return found

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        """A call to the peer failed."""
        self._health.failed(peer, error, self._clock())

    def heard(self, peer: PeerId) -> None:
        """The peer gave a sign of life."""
        now = self._clock()
        self._health.heard(peer, now)
        with self._lock:
            if self._table.get(peer) is not None and peer != self.me:
                self._heard_at[peer] = now

    def permit(self, caller: Caller, method: str) -> None:
        """What nodes ask of each other is for nodes whose record is known here.  Raises PermissionDenied."""
        if method.startswith(_FOR_NODES) and self._table.get(caller.peer) is None:
            raise PermissionDenied(f"{caller.peer[:8]} is known here as no node of this network: join it first")

    # --- for gossip ------------------------------------------------------------------------------------------------

    @property
    def digest(self) -> Digest:
        """For reconcile.Table; under `locked` only."""
        return self._table.digest

    @property
    def locked(self) -> threading.RLock:
        """Held by whoever compares tables, so that they do not change meanwhile."""
        return self._lock

    def signed_of(self, peer: PeerId) -> bytes | None:
        """A record as it is passed on."""
        with self._lock:
            return self._table.signed_of(peer)

    def record_of(self, peer: PeerId) -> Record | None:
        return self._table.get(peer)

    @property
    def sequence(self) -> int:
        """Of this node's record in force."""
        return self._own.sequence

    def merge(self, data: bytes, host: str) -> bool:
        """Takes a record in that came from `host`; whether it is news.  Raises what RoutingTable.merge does."""
        with self._lock:
            outcome = self._table.merge(data, self._wall(), addresses.site(host))
            if not isinstance(outcome, Accepted):
                return False
            self._forget_all(outcome.gave_way)
            record = outcome.record
            if record.peer == self.me:
                # Of this node's last run, if its clock went back; or another process has a copy of the key.
                log.get("peers").warning("another record of this node's own key is newer", address=record.address)
                self._issuer.outrank(record.sequence)
            else:
                self._links.learn(record.peer, record.address, record.certificate_sha256)
            return True

    def merge_load(self, data: bytes) -> None:
        """Takes a load report in, of a peer whose record is known; one that is refused is told in the log alone."""
        try:
            with self._lock:
                report = self._loads.merge(data, self._wall(), self._clock())
                if report is not None and self._table.get(report.peer) is None:
                    self._loads.forget(report.peer)
        except ShoalError as error:
            log.get("peers").debug("a load report was refused", error=error.message)

    def merge_revocations(self, data: bytes) -> list[PeerId]:
        """Takes the operator's list in; whom it puts out.  Raises what RoutingTable.merge_revocations does."""
        with self._lock:
            gone = self._table.merge_revocations(data, self._wall())[1]
            self._forget_all(gone)
            if self.me in gone:
                self._tell_refused(GrantRevoked("the operator took this node's grant back"))
        for peer in set(gone) - {self.me}:
            log.get("peers").info("a peer is put out: the operator took its grant back", peer=peer)
        return gone

    @property
    def refused(self) -> str:
        """Why others refuse what this node says of itself; empty: nothing is known of that."""
        return self._refused.message if self._refused is not None else ""

    @property
    def revocations(self) -> bytes:
        """The operator's list in force; empty: none."""
        return self._table.revocations

    def load_report(self) -> bytes:
        """This node's own, signed."""
        now = self._clock()
        with self._lock:
            if self._report is None or now - self._report[0] >= LOAD_S:
                load = self._load()
                report = LoadReport(
                    network=self.network.id,
                    public_key=self._identity.public_key,
                    time_ms=int(self._wall() * 1000),
                    queue=load.queue,
                    kv_bytes_free=load.kv_bytes_free or 0,
                    tokens_per_s=load.tokens_per_s,
                )
                self._report = (now, load_report.sign(report, self._identity))
            return self._report[1]

    def believe(self, peer: PeerId, state: State | None) -> None:
        """What membership thinks of a peer; None: it is no member any more."""
        with self._lock:
            before = self._states.get(peer)
            if state is None:
                self._states.pop(peer, None)
            else:
                self._states[peer] = state
            if state is State.ALIVE and before in (State.DEAD, State.LEFT):
                self._health.forget(peer)  # it came back as another process, or from beyond a partition

    def answered(self, peer: PeerId, rtt_s: float | None = None) -> None:
        """It answered at the address of its record, after `rtt_s` where that was a round trip."""
        now = self._clock()
        self._health.heard(peer, now - (rtt_s or 0.0))  # what failed since then it does not heal
        with self._lock:
            record = self._table.get(peer)
            if record is None or peer == self.me:
                return
            self._heard_at[peer] = now
            self._answered[peer] = record.address
            self._table.reached(peer, self._wall())
            if rtt_s is not None:
                self._distances.measured(peer, rtt_s)

    def unanswered(self) -> dict[PeerId, str]:
        """Members that hold something, and that this node has not heard at their address, and where that is."""
        with self._lock:
            return {
                peer: record.address
                for peer, state in self._states.items()
                if state is State.ALIVE
                and not self._has_answered(peer)
                and (record := self._table.get(peer)) is not None
                and record.held
            }

    def alive(self) -> dict[PeerId, str]:
        """Members that are alive, and where."""
        return self._members(State.ALIVE)

    def answering(self) -> dict[PeerId, str]:
        """Members that are alive and answered this node at their address."""
        with self._lock:
            return {peer: at for peer, at in self.alive().items() if self._has_answered(peer)}

    def not_dead(self) -> dict[PeerId, str]:
        """Those that are suspected too: until a suspicion has run out, nobody looks for them anew."""
        return self._members(State.ALIVE, State.SUSPECT)

    def marks(self) -> dict[PeerId, Mark]:
        """To be kept for the next start."""
        with self._lock:
            return self._table.marks()

    def tick(self) -> tuple[bool, list[PeerId]]:
        """What only time brings: whether this node has a new record, and which members have none any more, whatever
        became of it.  They are named until membership forgets them."""
        with self._lock:
            gone = dict.fromkeys(self._table.expire(self._wall()))
            gone |= dict.fromkeys(peer for peer in self._states if self._table.get(peer) is None)
            self._forget_all(gone)
            try:
                is_new = self._issue(self._wall())
            except ShoalError as error:  # its grant has ended or was taken back: a restart with another one mends it
                self._tell_refused(error)
                is_new = False
            return is_new, [peer for peer in gone if peer != self.me]

    def _issue(self, wall: float) -> bool:
        """Raises what RoutingTable.merge does, of this node's own record."""
        made = self._issuer.issue(wall)
        if made is not None:
            outcome = self._table.merge(sign(made, self._identity), wall)
            self._refused = None
            if isinstance(outcome, Accepted):
                self._forget_all(outcome.gave_way)
            self._own = made
        return made is not None

    def _say(self) -> None:
        self._issuer.say(replace(self._own, held=self._held if self._offers else ()))

    def _tell_refused(self, error: ShoalError) -> None:
        if self._refused is None or error.code != self._refused.code:
            self._refused = error
            log.get("peers").error(
                "others refuse what this node says of itself, and will soon take no call of it",
                error=error.message,
                advice="if it is the grant: ask the network's operator for another, and start this node again with it",
            )

    def _forget_all(self, peers: Iterable[PeerId]) -> None:
        for peer in peers:
            self._forget(peer)

    def _forget(self, peer: PeerId) -> None:
        """All but whether it is a member, which is not decided here."""
        self._heard_at.pop(peer, None)
        self._answered.pop(peer, None)
        self._distances.forget(peer)
        self._loads.forget(peer)
        self._health.forget(peer)
        self._links.forget(peer)
        self.on_forgotten(peer)

    def _members(self, *states: State) -> dict[PeerId, str]:
        with self._lock:
            return {
                peer: record.address
                for peer, state in self._states.items()
                if state in states and (record := self._table.get(peer)) is not None
            }

    def _is_usable(self, peer: PeerId) -> bool:
        return self._has_answered(peer) and self._states.get(peer, State.LEFT) is not State.LEFT

    def _has_answered(self, peer: PeerId) -> bool:
        """At the address that its record says now."""
        record = self._table.get(peer)
        return record is not None and self._answered.get(peer) == record.address

    def _health_of(self, peer: PeerId, now: float) -> Health:
        return max(_HEALTH[self._states.get(peer, State.LEFT)], self._health.standing(peer, now))

    def _load_of(self, peer: PeerId, now: float) -> Load | None:
        if peer == self.me:
            return self._load()
        report = self._loads.get(peer, now)
        return None if report is None else Load(report.queue, report.kv_bytes_free or None, report.tokens_per_s)

    def _status(self, peer: PeerId, record: Record, now: float) -> inference_pb2.PeerStatus:
        held = record.held[0] if record.held else Held("")
        score = self._health.score(peer)
        heard_at = self._heard_at.get(peer)
        load = self._load_of(peer, now) or Load()
        return inference_pb2.PeerStatus(
            peer_id=peer,
            address=record.address,
            zone=record.zone,
            state=self._state_name(peer, now),
            rtt_s=self._distances.smoothed_s(peer),
            model_id=held.model_id,
            first_layer=held.span.start,
            layers=len(held.span),
            experts=sum(mask.bit_count() for mask in held.experts.values()),
            queue=load.queue,
            age_s=0.0 if peer == self.me else None if heard_at is None else now - heard_at,
            last_error=score.last_error,
            calls_failed=score.calls_failed,
        )

    def _state_name(self, peer: PeerId, now: float) -> str:
        """`new`: it has not answered this node yet."""
        if peer == self.me:
            return "self"
        state = self._states.get(peer)
        if state is State.LEFT:
            return "left"
        if state is None or (state is State.ALIVE and not self._has_answered(peer)):
            return "new"
        return self._health_of(peer, now).name.lower()


def _unissued(
    public_key: bytes, network: Network, about: About, held: tuple[Held, ...], marks: Mapping[PeerId, Mark]
) -> Record:
    record = Record(
        public_key=public_key,
        addresses=(about.address,),
        certificate_sha256=about.certificate_sha256,
        sequence=0,
        issued_at_ms=0,
        expires_at_ms=0,
        zone=about.zone,
        owner=about.owner,
        version=about.version,
        held=held,
        sessions_max=about.sessions_max,
        kv_bytes_max=about.kv_bytes_max,
        network=network.id,
        grant=about.grant,
    )
    mark = marks.get(record.peer)
    return record if mark is None else replace(record, sequence=mark.sequence)


def _callable_by_none(held: Held) -> Held:
    """Steps come to a first stage from its own door; to every other one from the stage before it."""
    return held if held.span and held.span.start == 0 else replace(held, span=range(0), embed=False, head=False)


def _grant_end_ms(grant: bytes, network: Network, wall: Callable[[], float]) -> int | None:
    return grants.read(grant, network, int(wall() * 1000)).expires_at_ms if grant else None


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
