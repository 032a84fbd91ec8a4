"""Evidence: two different records that one peer signed with one sequence.  PROTOCOL.md, section 14.

Pure.  Law: both signed bytes are kept, so that whoever sees them can judge for himself; what was kept first stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from protos.limits import EVIDENCE_MAX

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.ids import PeerId


@dataclass(frozen=True, slots=True)
class Evidence:
    """`first` stays in force; both are the bytes of a SignedRecord."""

    peer: PeerId
    sequence: int
    first: bytes
    second: bytes


class EvidenceBook:
    """One piece for each peer, EVIDENCE_MAX in all."""

    def __init__(self) -> None:
        self._of_peer: dict[PeerId, Evidence] = {}

    def add(self, evidence: Evidence, is_reached: Callable[[PeerId], bool]) -> None:
        """Where it is full, what is known of a reached peer takes the place of what is known of an unreached one.

        Anybody can invent identities and let them contradict themselves.
        """
        if evidence.peer in self._of_peer:
            return
        if len(self._of_peer) >= EVIDENCE_MAX:
            least = next((peer for peer in self._of_peer if not is_reached(peer)), None)
            if least is None or not is_reached(evidence.peer):
                return
            del self._of_peer[least]
        self._of_peer[evidence.peer] = evidence

    def all(self) -> tuple[Evidence, ...]:
        return tuple(self._of_peer.values())
