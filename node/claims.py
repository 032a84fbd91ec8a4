"""Claims: everybody's newest claim, in the shape in which two nodes compare them by digests.  PROTOCOL.md, section 17.

Pure.  Law: equal claims give equal digests.  Who has left stands in no digest, since whoever never knew of it need not
learn of it; but where a bucket differs, its claims go along with the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from node.claim import PeerHash
from node.reconcile import Digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from node.claim import Claim

# As of records: a bucket of so few.
_WANTED_IN_BUCKET = 16


class Claims:
    """`put` and `drop` follow the membership's table; this node's own claim is among them."""

    def __init__(self) -> None:
        self.digest = Digest()
        self._claims: dict[PeerHash, Claim] = {}
        self._left: list[set[PeerHash]] = [set() for _ in range(256)]  # by the first byte, as the digest's buckets

    def __len__(self) -> int:
        return len(self._claims)

    def put(self, claim: Claim) -> None:
        """The newest of its peer."""
        self.drop(claim.peer)
        self._claims[claim.peer] = claim
        if claim.left:
            self._left[claim.peer[0]].add(claim.peer)
        else:
            self.digest.put(claim.peer, claim.incarnation)

    def drop(self, peer: PeerHash) -> None:
        claim = self._claims.pop(peer, None)
        if claim is None:
            return
        if claim.left:
            self._left[peer[0]].discard(peer)
        else:
            self.digest.drop(peer)

    def rank_of(self, peer: PeerHash) -> tuple[int, bool, int]:
        """Of a peer without a claim: below all."""
        claim = self._claims.get(peer)
        return (-1, False, 0) if claim is None else claim.rank

    def digests(self) -> bytes:
        """For a request: of as many buckets as there are claims for."""
        count = 1
        while count < len(self._left) and len(self.digest) > count * _WANTED_IN_BUCKET:
            count *= 2
        return b"".join(self.digest.digests(count))

    def differing(self, theirs: list[bytes]) -> list[int]:
        """The buckets, of as many as there are digests, whose digests differ from ours."""
        ours = self.digest.digests(len(theirs))
        return [bucket for bucket, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other]

    def of(self, buckets: Iterable[int], count: int) -> Iterator[Claim]:
        """All claims in these of `count` buckets."""
        each = len(self._left) // count
        for bucket in buckets:
            for peer, _ in self.digest.entries(bucket, count):
                yield self._claims[PeerHash(peer)]
            for left in self._left[bucket * each : (bucket + 1) * each]:
                yield from (self._claims[peer] for peer in sorted(left))

    def newer(self, theirs: Iterable[Claim], buckets: Iterable[int], count: int) -> Iterator[Claim]:
        """Of these buckets, what whoever sent `theirs` lacks or has an older one of."""
        ranks = {claim.peer: claim.rank for claim in theirs}
        for claim in self.of(buckets, count):
            rank = ranks.get(claim.peer)
            if (rank is None and not claim.left) or (rank is not None and rank < claim.rank):
                yield claim
