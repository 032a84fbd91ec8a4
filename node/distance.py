"""How far peers are: round-trip times of the last probes and calls.

Pure.  Two figures for two uses: the smoothed one says what a call costs now, load included; the least of the last
samples says how far the peer is, since load only adds to it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from protos.ids import PeerId

# Weight of a new sample, as TCP's estimator has it (RFC 6298).
GAIN: Final = 1 / 8
# The least of so many: a minute or more of probes on a LAN of ten.
SAMPLES: Final = 16


@dataclass(slots=True)
class _Entry:
    smoothed_s: float
    last: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))


class Distances:
    """Of peers that are forgotten with `forget`: as many as the routing table has."""

    def __init__(self) -> None:
        self._entries: dict[PeerId, _Entry] = {}

    def measured(self, peer: PeerId, rtt_s: float) -> None:
        entry = self._entries.get(peer)
        if entry is None:
            entry = self._entries[peer] = _Entry(rtt_s)
        entry.smoothed_s += GAIN * (rtt_s - entry.smoothed_s)
        entry.last.append(rtt_s)

    def smoothed_s(self, peer: PeerId) -> float | None:
        """None: never measured."""
        entry = self._entries.get(peer)
        return None if entry is None else entry.smoothed_s

    def least_s(self, peer: PeerId) -> float | None:
        """None: never measured."""
        entry = self._entries.get(peer)
        return None if entry is None else min(entry.last)

    def forget(self, peer: PeerId) -> None:
        self._entries.pop(peer, None)
