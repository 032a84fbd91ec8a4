"""Links: how long a datagram takes from one host to another, whether it arrives, and how often.

Law: each datagram takes the same number of draws from its sender's stream, whatever becomes of it, so that a fault
changes what it touches and not the luck of what comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.sim import dice

if TYPE_CHECKING:
    import random


@dataclass(frozen=True, slots=True)
class Quality:
    """Of a way from one host to another.  A datagram takes `latency_s` and an exponential of mean `jitter_s` more.

    `loss`, `twice` and `late` are probabilities: that it is lost, that it arrives a second time, and that it is held up
    by as much as `late_s`, so that others overtake it.
    """

    latency_s: float = 0.0003
    jitter_s: float = 0.0002
    loss: float = 0.0
    twice: float = 0.0
    late: float = 0.0
    late_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Cut:
    """What `sources` send to `targets` is lost.  The other direction is another cut: partitions may be one-sided."""

    sources: frozenset[int]
    targets: frozenset[int]

    def holds(self, source: int, target: int) -> bool:
        return source in self.sources and target in self.targets

    def touches(self, one: int, other: int) -> bool:
        return self.holds(one, other) or self.holds(other, one)


@dataclass(slots=True)
class Links:
    """`islands`: the island of each host; hosts of different ones are `between_s` further apart, each way."""

    seed: int
    quality: Quality = field(default_factory=Quality)
    islands: dict[int, int] = field(default_factory=dict)
    between_s: float = 0.0
    single: dict[tuple[int, int], Quality] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=list)
    _streams: dict[int, random.Random] = field(default_factory=dict)

    def is_cut(self, source: int, target: int) -> bool:
        return any(cut.holds(source, target) for cut in self.cuts)

    def delays_s(self, source: int, target: int) -> tuple[float, ...]:
        """One for each copy that arrives: none, one or two."""
        quality = self.single.get((source, target), self.quality) if self.single else self.quality
        dice_ = self._stream(source)
        lost, twice, late, jitter = dice_.random(), dice_.random(), dice_.random(), dice_.expovariate(1.0)
        if lost < quality.loss or (self.cuts and self.is_cut(source, target)):
            return ()
        delay_s = self.way_s(source, target, quality) + jitter * quality.jitter_s
        if late < quality.late:
            delay_s += quality.late_s * late / quality.late
        return (delay_s, delay_s + quality.late_s * twice / quality.twice) if twice < quality.twice else (delay_s,)

    def way_s(self, source: int, target: int, quality: Quality | None = None) -> float:
        """Without luck; this is what a connection's exchange takes, each way."""
        apart = self.islands.get(source, 0) != self.islands.get(target, 0)
        return (quality or self.quality).latency_s + (self.between_s if apart else 0.0)

    def _stream(self, source: int) -> random.Random:
        if (found := self._streams.get(source)) is None:
            found = self._streams[source] = dice.stream(self.seed, "links from", source)
        return found
