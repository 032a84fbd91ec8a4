"""The newest valid record of every peer.  PROTOCOL.md, section 14.

Pure: bytes in, verified state out; the clock is an argument, and fixed once for each operation.  Law: nobody pushes out
a peer that this node has reached, and no sequence goes back, not even in a restart.

A record is checked in this order, and the first failure is its outcome:
 1. size (RecordTooLarge); protobuf; lengths of key and signature (InvalidRecord)
 2. known to the byte: Same, at the price of a look into a table
 3. a peer of which nothing is known: how many of these its sender may introduce (Overloaded)
 4. network (WrongNetwork); signature (InvalidSignature)
 5. times (RecordFromFuture, InvalidRecord, RecordExpired); fields (InvalidRecord)
 6. in a permissioned network its grant (GrantMissing, GrantExpired, GrantRevoked, InvalidGrant)
 7. sequence, against the record in force: lower is Stale; equal but different is Equivocation, kept as evidence
 8. sequence, against the high-water mark where no record is in force (RecordRolledBack, Equivocation)
 9. room (Overloaded); then it is Accepted
What raises has changed nothing but the sender's count, and the evidence.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from node import address
from node import record as records
from node.evidence import Evidence, EvidenceBook
from node.grant import read as read_grant
from node.holders import Holders
from node.identity import peer_bytes
from node.marks import Marks, mark_of
from node.network import open_network
from node.newcomers import Newcomers
from node.reached import Reached
from node.reconcile import Digest
from node.revocations import Newer, RevocationList
from protos.errors import Equivocation, GrantExpired, GrantRevoked, Overloaded
from protos.limits import NEWCOMERS_MAX, RECORDS_MAX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.marks import Mark
    from node.network import Network
    from node.record import Held, Record
    from node.revocations import Outcome as RevocationsOutcome
    from protos.ids import PeerId


@dataclass(frozen=True, slots=True)
class Accepted:
    """Newer than what was known; it is known now.  `gave_way`: whose records are known no longer."""

    record: Record
    gave_way: tuple[PeerId, ...] = ()


@dataclass(frozen=True, slots=True)
class Same:
    """To the byte what is known already."""

    record: Record


@dataclass(frozen=True, slots=True)
class Stale:
    """A newer one of this peer is known, and stays."""

    record: Record


Outcome = Accepted | Same | Stale


@dataclass(frozen=True, slots=True)
class _Entry:
    record: Record
    sha256: bytes  # of what was signed
    signed: bytes  # as it is passed on


class RoutingTable:
    """Of one network.  `marks`: as `marks()` gave them before a restart."""

    def __init__(
        self,
        network: Network | None = None,
        *,
        marks: Mapping[PeerId, Mark] = MappingProxyType({}),
        records_max: int = RECORDS_MAX,
        newcomers_max: int = NEWCOMERS_MAX,
    ) -> None:
        self.network = network or open_network()
        self.digest = Digest()
        self._records_max = records_max
        self._newcomers_max = newcomers_max
        self._entries: dict[PeerId, _Entry] = {}
        self._records: dict[PeerId, Record] = {}
        self._is_shared = False
        self._peer_of: dict[bytes, PeerId] = {}  # by the sha256 of what was signed
        self._holders = Holders()
        self._newcomers = Newcomers()
        self._reached = Reached()
        self._marks = Marks(marks)
        self._evidence = EvidenceBook()
        self._revocations = RevocationList(self.network)

    def merge(self, data: bytes, now: float, sender: str | None = None) -> Outcome:
        """Takes a record in, checked as above.  `now`: seconds since 1970.

        `sender`: the host that it came from.  None: this node itself, whose own record is never a newcomer's.
        Raises what is listed above.
        """
        envelope = records.opened(data)
        sha256 = hashlib.sha256(envelope.content).digest()
        known = self._peer_of.get(sha256)
        if known is not None and not records.is_expired(self._records[known], int(now * 1000)):
            return Same(self._records[known])
        peer = envelope.peer
        is_new = sender is not None and not self.network.permissioned and not self._is_familiar(peer)
        if sender is not None and is_new and peer not in self._entries:
            self._newcomers.count(sender, now)
        record = records.verified(envelope, int(now * 1000), self.network, self._revocations.revocations)
        entry = _Entry(record, sha256, envelope.signed)
        is_back = sender is not None and not self.network.permissioned and not is_new and peer not in self._entries
        if is_back and not self._reached.has_room(_host(record)):
            is_new, is_back = True, False
        if self._is_stale(peer, entry):
            return Stale(record)
        gave_way = () if peer in self._entries else self._make_room(sender if is_new else None, now)
        self._put(peer, entry)
        if sender is not None and is_new and peer not in self._newcomers:
            self._newcomers.add(peer, sender, now)
        if is_back:
            self._reached.add(peer, _host(record))
        return Accepted(record, gave_way)

    def reached(self, peer: PeerId, now: float) -> None:
        """It answered at its record's address: from now on no newcomer pushes it out, unless many answer there."""
        record = self._records.get(peer)
        if record is None or self.network.permissioned:
            return
        if self._reached.add(peer, _host(record)):
            self._newcomers.discard(peer)
        else:
            self._newcomers.renew(peer, now)

    def is_reached(self, peer: PeerId) -> bool:
        """Or needs not to be: this node itself, and whoever has a grant."""
        return peer in self._entries and peer not in self._newcomers

    def get(self, peer: PeerId) -> Record | None:
        return self._records.get(peer)

    def signed_of(self, peer: PeerId) -> bytes | None:
        """As it was received, for passing on."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.signed

    def records(self) -> Mapping[PeerId, Record]:
        """Frozen: it stays as it is while the table changes.  Also those that expired since `expire` was called."""
        self._is_shared = True
        return MappingProxyType(self._records)

    def signed(self) -> dict[PeerId, bytes]:
        """As they were received, for passing on."""
        return {peer: entry.signed for peer, entry in self._entries.items()}

    def holders(self, model_id: str, unit: str) -> tuple[PeerId, ...]:
        """Who says that it holds this unit.  Raises InvalidManifest for what is no unit's name."""
        return self._holders.of_unit(model_id, unit)

    def held(self, model_id: str) -> Mapping[PeerId, Held]:
        """Who holds some of a model, and what.  Frozen."""
        return self._holders.of_model(model_id)

    def evidence(self) -> tuple[Evidence, ...]:
        """Of peers that signed two different records with one sequence; the oldest first."""
        return self._evidence.all()

    def marks(self) -> dict[PeerId, Mark]:
        """To be kept for the next start.  Peers that were never reached have none."""
        return {peer: mark for peer, mark in self._marks.all().items() if peer not in self._newcomers}

    @property
    def revocations(self) -> bytes:
        """The operator's signed list in force, for passing on and for keeping; empty: there is none."""
        return self._revocations.signed

    def merge_revocations(self, data: bytes, now: float) -> tuple[RevocationsOutcome, list[PeerId]]:
        """Takes a list in; also whom it puts out of this table.

        Raises InvalidGrant, WrongNetwork, InvalidSignature, Equivocation; then nothing has changed.
        """
        outcome = self._revocations.merge(data, int(now * 1000))
        gone = [peer for peer in self._revocations.revocations.at_ms if self._is_revoked(peer, now)]
        if isinstance(outcome, Newer):
            for peer in gone:
                self._drop(peer)
        return outcome, gone if isinstance(outcome, Newer) else []

    def expire(self, now: float) -> list[PeerId]:
        """Forgets the peers whose records have expired, or that nobody reached for long, and says which they were."""
        now_ms = int(now * 1000)
        gone = [peer for peer, record in self._records.items() if records.is_expired(record, now_ms)]
        for peer in gone:
            self._drop(peer)
        aged = self._newcomers.aged(now)
        for peer in aged:
            self._drop(peer)
        self._marks.sweep(now_ms, self._entries)
        return gone + aged

    def _is_familiar(self, peer: PeerId) -> bool:
        """Reached now, or before a restart or an expiry: its mark says so."""
        return peer not in self._newcomers and (peer in self._entries or self._marks.get(peer) is not None)

    def _is_stale(self, peer: PeerId, entry: _Entry) -> bool:
        """Raises RecordRolledBack, Equivocation."""
        old = self._entries.get(peer)
        if old is None:
            if mark := self._marks.get(peer):
                mark.check(peer, entry.record.sequence, entry.sha256)
            return False
        if entry.record.sequence == old.record.sequence and entry.sha256 != old.sha256:
            self._evidence.add(Evidence(peer, old.record.sequence, old.signed, entry.signed), self.is_reached)
            raise Equivocation(f"a node's record is refused: {peer[:8]} signed two different ones with one sequence")
        return entry.record.sequence < old.record.sequence

    def _make_room(self, newcomer_of: str | None, now: float) -> tuple[PeerId, ...]:
        """For one more: a newcomer takes another newcomer's place at most, and everybody else one of those.

        Who gave way.  Raises Overloaded; then nobody did.
        """
        is_full = len(self._entries) >= self._records_max
        if newcomer_of is not None:
            if self._newcomers and (is_full or len(self._newcomers) >= self._newcomers_max):
                return (self._drop(self._newcomers.giving_way(newcomer_of)),)
        elif is_full and self._newcomers:
            return (self._drop(self._newcomers.giving_way("")),)
        gone = self.expire(now) if is_full else []
        if len(self._entries) >= self._records_max:
            raise Overloaded(f"this node knows {self._records_max} peers, and takes no more in", retry_after_s=60)
        return tuple(gone)

    def _put(self, peer: PeerId, entry: _Entry) -> None:
        old = self._entries.get(peer)
        if old is not None:
            del self._peer_of[old.sha256]
            self._holders.drop(peer, old.record.held)
        self._thaw()
        self._entries[peer] = entry
        self._records[peer] = entry.record
        self._peer_of[entry.sha256] = peer
        self._holders.put(peer, entry.record.held)
        self._marks.raise_to(peer, mark_of(entry.record, entry.sha256))
        self.digest.put(peer_bytes(peer), entry.record.sequence)

    def _drop(self, peer: PeerId) -> PeerId:
        """Its mark stays, unless it was never reached."""
        entry = self._entries.pop(peer)
        self._thaw()
        del self._records[peer]
        del self._peer_of[entry.sha256]
        self._holders.drop(peer, entry.record.held)
        self.digest.drop(peer_bytes(peer))
        self._reached.discard(peer)
        if peer in self._newcomers:
            self._newcomers.discard(peer)
            self._marks.discard(peer)
        return peer

    def _is_revoked(self, peer: PeerId, now: float) -> bool:
        record = self._records.get(peer)
        if record is None:
            return False
        try:
            self._revocations.revocations.check(read_grant(record.grant, self.network, int(now * 1000)))
        except (GrantRevoked, GrantExpired):
            return True
        return False

    def _thaw(self) -> None:
        """Whoever has a frozen mapping keeps it as it was."""
        if self._is_shared:
            self._records = dict(self._records)
            self._is_shared = False


def _host(record: Record) -> str:
    return address.parse(record.address).host
