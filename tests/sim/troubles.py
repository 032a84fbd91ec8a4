"""Troubles: what goes wrong in a run, as data.  A scenario is a list of them; `trials.py` draws one from a seed.

Law: a trouble says when it begins and when it ends, and whom it touches, so that checkers know who may be blamed for
nothing in the meantime.  Hosts are numbers; times are seconds of virtual time.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.links import Quality


class Disk(enum.Enum):
    """What a host that starts again finds of its past."""

    WHOLE = "its key, its sequence and the records that it knew"
    KEY = "its key alone"


class Malice(enum.Enum):
    FORGE = "signs claims in others' names with its own key, and sends them"
    ACCUSE = "suspects healthy peers, again and again"
    REPLAY = "sends again what it once received: datagrams, old claims, old records"
    INFLATE = "says others' incarnations and sequences are higher, under their old signatures"
    FLOOD = "sends hundreds of datagrams a second"
    INVENT = "makes up identities and gossips about them"
    HIDE = "answers push-pull with itself alone"
    BOAST = "claims the highest incarnation there is for itself, and contradicts itself"


@dataclass(frozen=True, slots=True)
class Trouble:
    """`for_s`: infinity for what nothing ends."""

    at_s: float
    for_s: float

    @property
    def until_s(self) -> float:
        return self.at_s + self.for_s


@dataclass(frozen=True, slots=True)
class Crash(Trouble):
    """A process dies without a word; after `for_s` it starts again."""

    host: int
    disk: Disk = Disk.WHOLE
    moves: bool = False  # starts again at another address


@dataclass(frozen=True, slots=True)
class Leave(Trouble):
    """A node says good-bye; after `for_s` it comes back."""

    host: int


@dataclass(frozen=True, slots=True)
class Arrival(Trouble):
    """A host that was not there before joins.  Nothing is wrong with it: `for_s` is 0."""

    host: int


@dataclass(frozen=True, slots=True)
class Pause(Trouble):
    """SIGSTOP: neither timers nor messages; what arrives waits, as far as the socket's buffer goes."""

    host: int


@dataclass(frozen=True, slots=True)
class Slow(Trouble):
    """Lifeguard's anomaly: timers run, but messages wait, in and out, while the host is blocked.

    It is blocked for exponential times of mean `blocked_s`, and open for such of mean `open_s` between.
    """

    host: int
    blocked_s: float
    open_s: float


@dataclass(frozen=True, slots=True)
class Split(Trouble):
    sources: frozenset[int]
    targets: frozenset[int]
    both_ways: bool = True


@dataclass(frozen=True, slots=True)
class Storm(Trouble):
    """All links have another quality for a while."""

    quality: Quality


@dataclass(frozen=True, slots=True)
class ClockStep(Trouble):
    """A host's wall clock jumps by `by_s`, for good: `for_s` is 0."""

    host: int
    by_s: float


@dataclass(frozen=True, slots=True)
class Evil(Trouble):
    host: int
    malice: Malice
