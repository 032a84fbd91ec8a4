"""Push-pull: two routing tables find out what differs by digests, and exchange only that.  PROTOCOL.md, section 17.

Pure.  Law: equal tables exchange digests alone, and what differs crosses once, within two round trips:

    asker                                        answerer
    request    digests of its buckets    ->
                                         <-      reply      entries of the buckets that differ; the records of those
                                                            that are empty at the asker; its own if its bucket differs
    follow_up  what the answerer lacks,  ->
               and what the asker wants  <-      reply      the wanted records

The answerer keeps nothing between the two.  Each side merges what a message brings before it goes on.  Where a message
has no room for everything, it begins with another bucket each time, so that the rest follows with the next push-pulls.

A bucket's digest is a hash over its sorted entries: sums or XORs of hashes are cheaper to keep, but whoever chooses his
identities and sequences can steer them, and so hide a difference.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, NoReturn, Protocol

from node.identity import peer_bytes, peer_of
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest
from protos.limits import PEERS_MESSAGE_BYTES_MAX, RECORDS_MAX, SYNC_BUCKETS_MAX, SYNC_RECORDS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from random import Random

    from node.network import Network
    from protos.ids import PeerId

DIGEST_BYTES: Final = 12
"""Of each bucket: 2**48 tries to find two contents that look alike, which the next record tells apart again."""

PREFIX_BYTES: Final = 8
ENTRY_BYTES: Final = PREFIX_BYTES + 8

EMPTY: Final = bytes(DIGEST_BYTES)
"""The digest of a bucket without entries."""

# A bucket of so few entries: with ten nodes one digest does, with ten thousand there are SYNC_BUCKETS_MAX.
_ENTRIES_WANTED = 16

# In a message beside its records: 16,384 entries, 8,193 claims, 512 suspicions and a revocation list have 2.33 MiB.
_SPARE_BYTES: Final = 5 * 512 * 1024
_RECORDS_BYTES_MAX: Final = PEERS_MESSAGE_BYTES_MAX - _SPARE_BYTES


class Table(Protocol):
    """What is compared: a routing table."""

    @property
    def network(self) -> Network: ...

    @property
    def digest(self) -> Digest: ...

    def signed_of(self, peer: PeerId) -> bytes | None: ...


class Digest:
    """(peer, sequence) of all records, in SYNC_BUCKETS_MAX buckets by the first byte of the peer's sha256."""

    def __init__(self) -> None:
        self._buckets: list[dict[bytes, int]] = [{} for _ in range(SYNC_BUCKETS_MAX)]
        self._digests: list[bytes | None] = [EMPTY] * SYNC_BUCKETS_MAX  # None: to be computed
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, peer: bytes, sequence: int) -> None:
        bucket = self._buckets[peer[0]]
        self._count += peer not in bucket
        bucket[peer] = sequence
        self._digests[peer[0]] = None

    def drop(self, peer: bytes) -> None:
        del self._buckets[peer[0]][peer]
        self._count -= 1
        self._digests[peer[0]] = None

    def digests(self, count: int) -> list[bytes]:
        """Of so many buckets, a power of two: neighbours are hashed together where that is fewer than there are."""
        each = SYNC_BUCKETS_MAX // count
        fine = [self._digest(n) for n in range(SYNC_BUCKETS_MAX)]
        return [_joined(fine[n * each : (n + 1) * each]) for n in range(count)]

    def entries(self, bucket: int, count: int) -> Iterator[tuple[bytes, int]]:
        """The peers and sequences of one of `count` buckets."""
        each = SYNC_BUCKETS_MAX // count
        for fine in self._buckets[bucket * each : (bucket + 1) * each]:
            yield from fine.items()

    def having(self, prefix: bytes) -> Iterator[bytes]:
        """The peers that begin so: one, unless somebody has tried 2**32 keys."""
        return (peer for peer in self._buckets[prefix[0]] if peer.startswith(prefix))

    def _digest(self, n: int) -> bytes:
        found = self._digests[n]
        if found is None:
            entries = b"".join(
                peer + sequence.to_bytes(8, "little") for peer, sequence in sorted(self._buckets[n].items())
            )
            found = self._digests[n] = _hash(entries) if entries else EMPTY
        return found


def request(table: Table) -> pb.SyncRequest:
    """The first message."""
    count = 1
    while count < SYNC_BUCKETS_MAX and len(table.digest) > count * _ENTRIES_WANTED:
        count *= 2
    return pb.SyncRequest(network=table.network.id, digests=b"".join(table.digest.digests(count)))


def reply(table: Table, message: pb.SyncRequest, random: Random, me: PeerId | None = None) -> pb.SyncReply:
    """The answer to either request, whose records are merged already.  Raises InvalidRequest, WrongNetwork.

    `me`: whose table it is; to who may lack that record it goes at once, and first.
    """
    table.network.check(message.network, "a push-pull")
    made = pb.SyncReply(network=table.network.id)
    chosen: list[bytes] = []
    own = None if me is None else peer_bytes(me)
    if message.digests:
        theirs = _cut(message.digests, DIGEST_BYTES, SYNC_BUCKETS_MAX, "digests")
        if len(theirs) & (len(theirs) - 1):
            _refuse(f"it has {len(theirs)} digests, which is no power of two")
        chosen += _compare(table.digest, theirs, made)
        if own is not None and own[0] * len(theirs) // SYNC_BUCKETS_MAX in made.differing:
            chosen.append(own)
    for prefix in _cut(message.wants, PREFIX_BYTES, SYNC_RECORDS_MAX, "wants"):
        chosen += table.digest.having(prefix)
    made.records.extend(_records(table, chosen, random, own))
    return made


def follow_up(table: Table, asked: pb.SyncRequest, answer: pb.SyncReply, random: Random) -> pb.SyncRequest | None:
    """The second message, once the answer's records are merged.  None: there is nothing to give and nothing to want.

    Raises InvalidRequest, WrongNetwork.
    """
    table.network.check(answer.network, "a push-pull")
    count = len(asked.digests) // DIGEST_BYTES
    if list(answer.differing) != sorted(set(answer.differing)) or any(n >= count for n in answer.differing):
        _refuse("its buckets are none of those that were asked about, or out of order")
    entries = _cut(answer.entries, ENTRY_BYTES, RECORDS_MAX, "entries")
    theirs = {entry[:PREFIX_BYTES]: int.from_bytes(entry[PREFIX_BYTES:], "little") for entry in entries}
    give: list[bytes] = []
    for bucket in answer.differing:
        for peer, sequence in table.digest.entries(bucket, count):
            known = theirs.get(peer[:PREFIX_BYTES])
            if known is None or known < sequence:
                give.append(peer)
            if known is not None and known <= sequence:
                del theirs[peer[:PREFIX_BYTES]]
    wants = list(theirs)
    if not give and not wants:
        return None
    random.shuffle(wants)
    made = pb.SyncRequest(network=table.network.id, wants=b"".join(wants[:SYNC_RECORDS_MAX]))
    made.records.extend(_records(table, give, random))
    return made


def _compare(digest: Digest, theirs: list[bytes], made: pb.SyncReply) -> list[bytes]:
    """Writes the entries of the buckets that differ; gives the peers that the asker lacks for certain."""
    lacking: list[bytes] = []
    entries: list[bytes] = []
    for bucket, (ours, other) in enumerate(zip(digest.digests(len(theirs)), theirs, strict=True)):
        if ours == other:
            continue
        if other == EMPTY:
            lacking += (peer for peer, _ in digest.entries(bucket, len(theirs)))
            continue
        made.differing.append(bucket)
        entries += (
            peer[:PREFIX_BYTES] + sequence.to_bytes(8, "little")
            for peer, sequence in digest.entries(bucket, len(theirs))
        )
    made.entries = b"".join(entries)
    return lacking


def _records(table: Table, peers: list[bytes], random: Random, first: bytes | None = None) -> Iterable[bytes]:
    """As many as a message takes; if not all, then each time others, but `first` among them."""
    peers = list(dict.fromkeys(peers))
    random.shuffle(peers)
    peers.sort(key=lambda peer: peer != first)
    room = _RECORDS_BYTES_MAX
    for peer in peers[:SYNC_RECORDS_MAX]:
        signed = table.signed_of(peer_of(peer)) or b""
        room -= len(signed) + 4
        if room < 0:
            return
        yield signed


def _cut(data: bytes, size: int, count_max: int, what: str) -> list[bytes]:
    """Raises InvalidRequest."""
    if len(data) % size or len(data) > size * count_max:
        _refuse(f"its {what} have {len(data)} bytes; it must be a multiple of {size}, up to {count_max} of them")
    return [data[n : n + size] for n in range(0, len(data), size)]


def _joined(digests: list[bytes]) -> bytes:
    if len(digests) == 1:
        return digests[0]
    return EMPTY if all(one == EMPTY for one in digests) else _hash(b"".join(digests))


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, person=b"shoal-sync").digest()


def _refuse(why: str) -> NoReturn:
    raise InvalidRequest(f"a push-pull is refused: {why}")
