"""Marks: how far each peer's sequence had come, so that nobody brings back what it has replaced.

Pure; PROTOCOL.md, section 14.  Law: a mark never goes back, and outlives its record for as long as an older one could
still be valid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from protos.errors import Equivocation, RecordRolledBack
from protos.limits import CLOCK_DIFFERENCE_S_MAX, MARKS_MAX, RECORD_S_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from node.record import Record
    from protos.ids import PeerId

DIGEST_BYTES: Final = 16


@dataclass(frozen=True, slots=True)
class Mark:
    """`digest`: the beginning of that record's sha256.  `ends_at_ms`: since 1970; what is older has expired by then."""

    sequence: int
    digest: bytes
    ends_at_ms: int

    def check(self, peer: PeerId, sequence: int, sha256: bytes) -> None:
        """A record of a peer of which none is in force.  Raises RecordRolledBack, Equivocation."""
        if sequence < self.sequence:
            raise RecordRolledBack(
                f"a node's record is refused: {peer[:8]} has signed {self.sequence} since, and this is {sequence}"
            )
        if sequence == self.sequence and sha256[:DIGEST_BYTES] != self.digest:
            raise Equivocation(f"a node's record is refused: {peer[:8]} signed another one with this sequence")


def mark_of(record: Record, sha256: bytes) -> Mark:
    """A record with a lower sequence was issued earlier, and holds for RECORD_S_MAX at most."""
    ends_at_ms = record.issued_at_ms + (RECORD_S_MAX + CLOCK_DIFFERENCE_S_MAX) * 1000
    return Mark(record.sequence, sha256[:DIGEST_BYTES], ends_at_ms)


class Marks:
    """At most MARKS_MAX; beyond it those go that end first, but never those of peers in the table."""

    def __init__(self, known: Mapping[PeerId, Mark]) -> None:
        self._marks = dict(known)

    def get(self, peer: PeerId) -> Mark | None:
        return self._marks.get(peer)

    def raise_to(self, peer: PeerId, mark: Mark) -> None:
        old = self._marks.get(peer)
        if old is None or mark.sequence >= old.sequence:
            self._marks[peer] = mark

    def discard(self, peer: PeerId) -> None:
        self._marks.pop(peer, None)

    def all(self) -> dict[PeerId, Mark]:
        return dict(self._marks)

    def sweep(self, now_ms: int, in_table: Iterable[PeerId]) -> None:
        """Forgets what has ended, and what is too much."""
        kept = set(in_table)
        free = [peer for peer in self._marks if peer not in kept]
        ended = [peer for peer in free if self._marks[peer].ends_at_ms <= now_ms]
        for peer in ended:
            del self._marks[peer]
        if (excess := len(self._marks) - MARKS_MAX) > 0:
            free = sorted((peer for peer in free if peer in self._marks), key=lambda peer: self._marks[peer].ends_at_ms)
            for peer in free[:excess]:
                del self._marks[peer]
