"""View: the frozen snapshot of the swarm, as one model sees it, that one decision reads.

Pure: a decision reads one view from start to end, never two moments mixed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from protos.ids import PeerId


class Health(enum.IntEnum):
    """What this node observed of a peer; smaller is better."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2


@dataclass(frozen=True, slots=True)
class Record:
    """What a peer says that it holds of the view's model, and where it is; slow-changing."""

    address: str = ""
    zone: str = ""
    layers: range = range(0)  # layers whose trunk it holds; served whole, as one stage
    embed: bool = False
    head: bool = False
    text: bool = False
    # layer -> bitmask of the routed experts that it holds there: bit e is expert e.
    experts: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a peer says that it is, seconds old."""

    queue: int = 0  # sessions that wait or run
    kv_bytes_free: int | None = None  # None: no limit
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """Records, loads, health and round-trip times by peer.  What is not listed is idle, alive and at no distance."""

    records: Mapping[PeerId, Record]
    loads: Mapping[PeerId, Load] = field(default_factory=dict)
    health: Mapping[PeerId, Health] = field(default_factory=dict)
    rtt_s: Mapping[PeerId, float] = field(default_factory=dict)

    def live(self) -> list[PeerId]:
        """Peers that may be chosen, in an order that does not depend on the mapping's."""
        return sorted(peer for peer in self.records if self.health_of(peer) is not Health.DEAD)

    def health_of(self, peer: PeerId) -> Health:
        return self.health.get(peer, Health.ALIVE)

    def load_of(self, peer: PeerId) -> Load:
        return self.loads.get(peer, Load())

    def rtt_of(self, peer: PeerId) -> float:
        return self.rtt_s.get(peer, 0.0)
