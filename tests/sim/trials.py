"""Trials: the mixed-fault scenario that belongs to a seed.  Pure: a seed in, a scenario out.

Every trial has hosts that join, troubles of several kinds that overlap, an end of all troubles, and a time within which
everybody must agree after that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.sim import dice
from tests.sim.links import Quality
from tests.sim.troubles import (
    Arrival,
    ClockStep,
    Crash,
    Disk,
    Evil,
    Leave,
    Malice,
    Pause,
    Slow,
    Split,
    Storm,
    Trouble,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

HOSTS_MIN, HOSTS_MAX = 5, 30
TROUBLES_MIN, TROUBLES_MAX = 4, 10
CALM_S = 10.0  # from the first start to the first trouble
TROUBLED_S = 40.0  # from then on; whatever has begun is ended by the end of this
SKEW_S_MAX = 3600.0
CRASHED_PART_MAX = 3  # at most one host of so many is gone for good


@dataclass(frozen=True, slots=True)
class Scenario:
    """`starts_s`: when each host starts; who has none comes by an Arrival.  `seeds`: whom each is told."""

    seed: int
    hosts: int
    starts_s: dict[int, float]
    seeds: dict[int, tuple[int, ...]]
    skews_s: dict[int, float]
    islands: dict[int, int]
    between_s: float
    quality: Quality
    troubles: tuple[Trouble, ...]
    ends_s: float

    @property
    def evil(self) -> frozenset[int]:
        return frozenset(trouble.host for trouble in self.troubles if isinstance(trouble, Evil))


def draw(seed: int) -> Scenario:
    luck = dice.stream(seed, "trial")
    hosts = HOSTS_MIN + int((HOSTS_MAX - HOSTS_MIN + 1) * luck.random() ** 2)
    ends_s = CALM_S + TROUBLED_S
    troubles = _Troubles(luck, hosts, ends_s).draw()
    arriving = {trouble.host for trouble in troubles if isinstance(trouble, Arrival)}
    return Scenario(
        seed=seed,
        hosts=hosts,
        starts_s={host: luck.uniform(0.0, 3.0) for host in range(hosts) if host not in arriving},
        seeds={host: _seeds(luck, host, hosts, arriving) for host in range(hosts)},
        skews_s={host: luck.uniform(-SKEW_S_MAX, SKEW_S_MAX) if luck.random() < 0.3 else 0.0 for host in range(hosts)},
        islands={host: luck.randrange(3) for host in range(hosts)},
        between_s=luck.choice((0.0, 0.002, 0.02, 0.08)),
        quality=_quality(luck, luck.choice((0.0, 0.0, 0.01, 0.05, 0.15))),
        troubles=tuple(sorted(troubles, key=lambda trouble: trouble.at_s)),
        ends_s=ends_s,
    )


def scene(*troubles: Trouble, hosts: int = 6, seed: int = 1, loss: float = 0.0) -> Scenario:
    """A scenario of these troubles alone, on good links, for tests that are about one thing."""
    ends_s = max((trouble.until_s for trouble in troubles if not math.isinf(trouble.for_s)), default=CALM_S)
    arriving = {trouble.host for trouble in troubles if isinstance(trouble, Arrival)}
    return Scenario(
        seed=seed,
        hosts=hosts,
        starts_s={host: 0.1 * host for host in range(hosts) if host not in arriving},
        seeds={host: (0,) if host else () for host in range(hosts)},
        skews_s=dict.fromkeys(range(hosts), 0.0),
        islands={},
        between_s=0.0,
        quality=Quality(loss=loss),
        troubles=troubles,
        ends_s=ends_s,
    )


def _seeds(luck: random.Random, host: int, hosts: int, arriving: set[int]) -> tuple[int, ...]:
    """Host 0 for all, and one more: that two seeds know each other makes one network of it."""
    others = [other for other in range(hosts) if other != host and other not in arriving]
    return tuple(dict.fromkeys((*((0,) if host else ()), luck.choice(others))))


def _quality(luck: random.Random, loss: float) -> Quality:
    return Quality(
        latency_s=luck.choice((0.0002, 0.001, 0.01)),
        jitter_s=luck.choice((0.0002, 0.002, 0.02)),
        loss=loss,
        twice=luck.choice((0.0, 0.0, 0.1)),
        late=luck.choice((0.0, 0.0, 0.05)),
    )


class _Troubles:
    """Draws them one by one.  Host 0 never dies for good: it is the seed of all."""

    def __init__(self, luck: random.Random, hosts: int, ends_s: float) -> None:
        self._luck = luck
        self._hosts = hosts
        self._ends_s = ends_s
        self._taken: set[int] = set()  # has a trouble that starts or stops it: one of these a host
        self._gone = 0
        self._evil = 0

    def draw(self) -> list[Trouble]:
        kinds: tuple[Callable[[], Trouble | None], ...] = (
            self._crash,
            self._leave,
            self._arrival,
            self._pause,
            self._slow,
            self._split,
            self._one_sided,
            self._storm,
            self._clock_step,
            self._evil_one,
        )
        drawn = [self._luck.choice(kinds)() for _ in range(self._luck.randint(TROUBLES_MIN, TROUBLES_MAX))]
        return [trouble for trouble in drawn if trouble is not None]

    def _span(self, for_s_max: float) -> tuple[float, float]:
        at_s = self._luck.uniform(CALM_S, self._ends_s - 2.0)
        return at_s, min(self._luck.uniform(1.0, for_s_max), self._ends_s - at_s)

    def _anybody(self) -> int:
        return self._luck.randrange(self._hosts)

    def _free(self) -> int | None:
        """One that nothing else starts or stops, and that is not the seed of all."""
        free = [host for host in range(1, self._hosts) if host not in self._taken]
        if not free:
            return None
        host = self._luck.choice(free)
        self._taken.add(host)
        return host

    def _may_go(self) -> bool:
        if self._gone >= self._hosts // CRASHED_PART_MAX or self._luck.random() < 0.5:
            return False
        self._gone += 1
        return True

    def _crash(self) -> Trouble | None:
        at_s, for_s = self._span(25.0)
        disk, moves = self._luck.choice((Disk.WHOLE, Disk.WHOLE, Disk.KEY)), self._luck.random() < 0.3
        if (host := self._free()) is None:
            return None
        return Crash(at_s, math.inf if self._may_go() else for_s, host, disk, moves)

    def _leave(self) -> Trouble | None:
        at_s, for_s = self._span(25.0)
        if (host := self._free()) is None:
            return None
        return Leave(at_s, math.inf if self._may_go() else for_s, host)

    def _arrival(self) -> Trouble | None:
        at_s, _ = self._span(1.0)
        host = self._free()
        return None if host is None or len(self._taken) > self._hosts // 2 else Arrival(at_s, 0.0, host)

    def _pause(self) -> Trouble:
        return Pause(*self._span(20.0), self._anybody())

    def _slow(self) -> Trouble:
        blocked_s, open_s = self._luck.choice((0.3, 1.0, 4.0)), self._luck.choice((0.01, 0.3, 2.0))
        return Slow(*self._span(30.0), self._anybody(), blocked_s, open_s)

    def _split(self) -> Trouble:
        return self._cut(both_ways=True)

    def _one_sided(self) -> Trouble:
        return self._cut(both_ways=False)

    def _cut(self, *, both_ways: bool) -> Trouble:
        some = frozenset(self._luck.sample(range(self._hosts), self._luck.randint(1, max(1, self._hosts // 2))))
        others = frozenset(range(self._hosts)) - some
        return Split(*self._span(25.0), some, others, both_ways)

    def _storm(self) -> Trouble:
        return Storm(*self._span(20.0), _quality(self._luck, self._luck.choice((0.2, 0.4, 0.6))))

    def _clock_step(self) -> Trouble:
        at_s, _ = self._span(1.0)
        return ClockStep(at_s, 0.0, self._anybody(), self._luck.uniform(-SKEW_S_MAX, SKEW_S_MAX))

    def _evil_one(self) -> Trouble | None:
        """At most one host of five, and not the seed of all: an eclipse by one's only seed is a test of its own."""
        if self._evil >= max(1, self._hosts // 5):
            return None
        self._evil += 1
        return Evil(*self._span(35.0), self._luck.randrange(1, self._hosts), self._luck.choice(tuple(Malice)))
