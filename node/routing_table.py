"""The newest valid record of every peer.  PROTOCOL.md, section 14.

Pure: bytes in, verified state out; the clock is an argument, and fixed once for each operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.record import Record, is_expired, read
from protos.errors import InvalidRecord, Overloaded
from protos.limits import RECORDS_MAX

if TYPE_CHECKING:
    from protos import peers_pb2 as pb
    from protos.ids import PeerId


@dataclass(frozen=True, slots=True)
class Accepted:
    """Newer than what was known; it is known now."""

    record: Record


@dataclass(frozen=True, slots=True)
class Same:
    """To the byte what is known already."""

    record: Record


@dataclass(frozen=True, slots=True)
class Stale:
    """A newer one of this peer is known, and stays."""

    record: Record


Outcome = Accepted | Same | Stale


class RoutingTable:
    """At most `records_max` peers; who is in it is pushed out by nobody."""

    def __init__(self, records_max: int = RECORDS_MAX) -> None:
        self._records_max = records_max
        self._records: dict[PeerId, Record] = {}
        self._signed: dict[PeerId, pb.SignedRecord] = {}
        self._peer_of: dict[bytes, PeerId] = {}  # by the record's bytes

    def merge(self, signed: pb.SignedRecord, now: float) -> Outcome:
        """Takes a record in, checked in this order: known to the byte; valid by itself; sequence; room.

        Two records of one sequence contradict each other: the one that is known stays.  `now`: seconds since 1970.
        Raises InvalidRecord, InvalidSignature, Overloaded; then nothing has changed.
        """
        return self.known(signed, now) or self.add(signed, read(signed, int(now * 1000)), now)

    def known(self, signed: pb.SignedRecord, now: float) -> Same | None:
        """The first part of `merge`: then nothing needs to be verified."""
        peer = self._peer_of.get(signed.record)
        if peer is None or is_expired(self._records[peer], int(now * 1000)):
            return None
        return Same(self._records[peer])

    def add(self, signed: pb.SignedRecord, record: Record, now: float) -> Outcome:
        """The last part of `merge`.  `record`: what `read` made of it, with this `now`."""
        peer = record.peer
        old = self._records.get(peer)
        if old is not None and record.sequence < old.sequence:
            return Stale(record)
        if old is not None and record.sequence == old.sequence:
            raise InvalidRecord(f"a node's record is refused: {peer[:8]} signed two different ones with one sequence")
        if old is None and len(self._records) >= self._records_max:
            self.expire(now)
            if len(self._records) >= self._records_max:
                raise Overloaded(f"this node knows {self._records_max} peers, and takes no more in", retry_after_s=60)
        self._drop(peer)
        self._records[peer] = record
        self._signed[peer] = signed
        self._peer_of[signed.record] = peer
        return Accepted(record)

    def get(self, peer: PeerId) -> Record | None:
        return self._records.get(peer)

    def records(self) -> dict[PeerId, Record]:
        """Also those that expired since `expire` was last called."""
        return dict(self._records)

    def signed(self) -> dict[PeerId, pb.SignedRecord]:
        """As they were received, for passing on."""
        return dict(self._signed)

    def expire(self, now: float) -> list[PeerId]:
        """Forgets the peers whose records have expired, and says which they were."""
        gone = [peer for peer, record in self._records.items() if is_expired(record, int(now * 1000))]
        for peer in gone:
            self._drop(peer)
        return gone

    def _drop(self, peer: PeerId) -> None:
        if peer in self._records:
            del self._records[peer]
            del self._peer_of[self._signed.pop(peer).record]
