"""PeerHealth: what the calls to each peer came to: how long they take, and whether to ask it at all.

Pure: `now` is an argument.  Small and fast: the thread that computes asks it at every call.  Other threads may use it
at the same time (the network's readers, the exchange of records): each operation touches one entry, and two at once
cost at most a sample.  Law: a peer is DEAD only while its breaker is open, and no breaker is open for ever; what one
node observed here goes into its own views and never into what it tells others.

Three ways to fail, by what to expect next:
- LOST: the connection broke, nobody listens, or the peer says that it leaves.  Open at once; any sign of life closes
  it.
- LATE: it did not answer in time, or was overloaded.  The second miss in a row opens; its next answer closes.  A sign
  of life on another lane does not, since a stuck peer may well still talk there.
- FAULTY: it answered with what is no answer (malformed, not finite).  Open at once and for longer, whatever it says
  meanwhile.
A breaker that was open leaves its peer SUSPECT (asked after the others) for as long again, or until a success; then it
is on trial: one more miss opens the breaker for twice as long, up to OPEN_S_MAX.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coordinator.view import Health
from protos.errors import LocalError, PeerLost, RemoteError, ShuttingDown, Unauthenticated

if TYPE_CHECKING:
    from protos.errors import ShoalError
    from protos.ids import PeerId

# Below it, a busy machine's scheduling looks like a lost peer: two cores, eight threads and a garbage collection.
DEADLINE_S_MIN = 0.15
DEADLINE_S_MAX = 30.0
# Before any history: weights may be cold, and the peer's kernels not compiled.
DEADLINE_FIRST_S = 2.0
DEADLINE_FIRST_PAIR_S = 0.002

MISSES_MAX = 2
OPEN_S = 1.0
OPEN_FAULTY_S = 5.0
OPEN_S_MAX = 60.0
# So long without a failure, and the next one opens the breaker for OPEN_S again.
TRIPS_FORGOTTEN_S = 120.0

# Peers remembered; of more, the one that was learned first is forgotten.
HEALTH_PEERS_MAX = 4096

# Weight of a new sample.  As TCP's round-trip estimator (RFC 6298), which also gives the four mean deviations below:
# for latencies with a tail that is beyond the 95th percentile.
_GAIN = 1 / 8
_DEVIATIONS = 4.0
# Weight of the first sample's own size as its deviation, as there.
_FIRST_DEVIATION = 1 / 2
_BUCKETS: Final = 18  # by the power of two of the pairs: PAIRS_MAX is 2^17


class _Failure(enum.Enum):
    LOST = enum.auto()
    LATE = enum.auto()
    FAULTY = enum.auto()


@dataclass(frozen=True, slots=True)
class Score:
    """A peer's figures, for people."""

    calls: int = 0
    calls_failed: int = 0
    calls_late: int = 0
    latency_s: float | None = None  # of the last answered calls of the commonest size
    last_error: str = ""  # its code and message


@dataclass(slots=True)
class _Latency:
    mean_s: float
    deviation_s: float
    samples: int = 1

    def add(self, latency_s: float) -> None:
        error = latency_s - self.mean_s
        self.mean_s += _GAIN * error
        self.deviation_s += _GAIN * (abs(error) - self.deviation_s)
        self.samples += 1

    @property
    def bound_s(self) -> float:
        return self.mean_s + _DEVIATIONS * self.deviation_s


@dataclass(slots=True)
class _Entry:
    latencies: list[_Latency | None] = field(default_factory=lambda: [None] * _BUCKETS)
    misses: int = 0  # in a row
    failure: _Failure | None = None  # why the breaker opened last; None: nothing is held against the peer
    failed_at: float = 0.0
    open_until: float = 0.0
    suspect_until: float = 0.0
    trips: int = 0
    calls: int = 0
    calls_failed: int = 0
    calls_late: int = 0
    last_error: ShoalError | None = None


class PeerHealth:
    def __init__(self) -> None:
        self._entries: dict[PeerId, _Entry] = {}

    def succeeded(self, peer: PeerId, latency_s: float, pairs: int, now: float) -> None:
        """A call of so many pairs was answered, be it late."""
        entry = self._entry(peer)
        entry.calls += 1
        bucket = _bucket(pairs)
        known = entry.latencies[bucket]
        if known is None:
            entry.latencies[bucket] = _Latency(latency_s, latency_s * _FIRST_DEVIATION)
        else:
            known.add(latency_s)
        if entry.failure is not _Failure.FAULTY or now >= entry.open_until:
            self._close(entry)

    def failed(self, peer: PeerId, error: ShoalError, now: float) -> bool:
        """A call failed.  True: the breaker just opened.  Our own bugs are not held against a peer."""
        if isinstance(error, LocalError):
            return False
        entry = self._entry(peer)
        entry.calls += 1
        entry.calls_failed += 1
        entry.last_error = error
        return self._miss(entry, _failure(error), now)

    def late(self, peer: PeerId, now: float) -> bool:
        """A call did not end by its deadline; its answer may still come.  True: the breaker just opened."""
        entry = self._entry(peer)
        entry.calls_late += 1
        return self._miss(entry, _Failure.LATE, now)

    def heard(self, peer: PeerId, now: float) -> None:
        """The peer said something, on whatever lane: it is not lost."""
        entry = self._entries.get(peer)
        if entry is not None and entry.failure is _Failure.LOST and now > entry.failed_at:
            self._close(entry)

    def forget(self, peer: PeerId) -> None:
        """Drops what was learned: the peer is gone, or came back as another process."""
        self._entries.pop(peer, None)

    def deadline_s(self, peer: PeerId, pairs: int) -> float:
        """How long to wait for a call of so many pairs before another replica is asked."""
        entry = self._entries.get(peer)
        bound = None if entry is None else _bound_s(entry.latencies, pairs)
        if bound is None:
            bound = DEADLINE_FIRST_S + pairs * DEADLINE_FIRST_PAIR_S
        return min(max(bound, DEADLINE_S_MIN), DEADLINE_S_MAX)

    def state(self, peer: PeerId, now: float) -> Health:
        entry = self._entries.get(peer)
        if entry is None or now >= entry.suspect_until:
            return Health.ALIVE
        return Health.DEAD if now < entry.open_until else Health.SUSPECT

    def standing(self, peer: PeerId, now: float) -> Health:
        """For who plans: as `state`, but lateness makes nobody DEAD.  A busy peer still holds what it holds."""
        state = self.state(peer, now)
        if state is Health.DEAD and self._entries[peer].failure is _Failure.LATE:
            return Health.SUSPECT
        return state

    def score(self, peer: PeerId) -> Score:
        entry = self._entries.get(peer)
        if entry is None:
            return Score()
        error = entry.last_error
        commonest = max((known for known in entry.latencies if known), key=lambda known: known.samples, default=None)
        return Score(
            calls=entry.calls,
            calls_failed=entry.calls_failed,
            calls_late=entry.calls_late,
            latency_s=commonest.mean_s if commonest else None,
            last_error=f"{error.code}: {error.message}" if error else "",
        )

    def _entry(self, peer: PeerId) -> _Entry:
        entry = self._entries.get(peer)
        if entry is None:
            if len(self._entries) >= HEALTH_PEERS_MAX:
                self._entries.pop(next(iter(list(self._entries))), None)  # a list, since others may add meanwhile
            entry = self._entries.setdefault(peer, _Entry())
        return entry

    def _miss(self, entry: _Entry, failure: _Failure, now: float) -> bool:
        was_open = now < entry.open_until
        on_trial = entry.failure is not None and now - entry.failed_at < TRIPS_FORGOTTEN_S
        entry.misses = entry.misses + 1 if now - entry.failed_at < TRIPS_FORGOTTEN_S else 1
        entry.failed_at = now
        if was_open and not (failure is _Failure.FAULTY and entry.failure is not _Failure.FAULTY):
            return False  # calls that were under way when it opened say nothing new
        if failure is _Failure.LATE and entry.misses < MISSES_MAX and not on_trial:
            entry.suspect_until = max(entry.suspect_until, now + OPEN_S)
            return False
        self._open(entry, failure, now, trips=entry.trips if on_trial else 0)
        return not was_open

    def _open(self, entry: _Entry, failure: _Failure, now: float, *, trips: int) -> None:
        first_s = OPEN_FAULTY_S if failure is _Failure.FAULTY else OPEN_S
        open_s = min(first_s * 2.0**trips, OPEN_S_MAX)
        entry.failure = failure
        entry.trips = min(trips + 1, 16)  # beyond OPEN_S_MAX for either
        entry.open_until = now + open_s
        entry.suspect_until = entry.open_until + open_s

    def _close(self, entry: _Entry) -> None:
        """It answers again.  A faulty one stays on trial: a good answer now and then does not buy it many bad ones."""
        if entry.failure is not _Failure.FAULTY:
            entry.failure = None
            entry.misses = 0
        if entry.suspect_until:
            entry.open_until = entry.suspect_until = 0.0


def _failure(error: ShoalError) -> _Failure:
    if isinstance(error, RemoteError) and not isinstance(error, Unauthenticated):  # a token that ran out is renewed
        return _Failure.FAULTY
    return _Failure.LOST if isinstance(error, PeerLost | ShuttingDown) else _Failure.LATE


def _bucket(pairs: int) -> int:
    return min(max(pairs, 1).bit_length(), _BUCKETS) - 1


def _bound_s(latencies: list[_Latency | None], pairs: int) -> float | None:
    """From calls of that size; else from smaller ones, in proportion; else from larger ones.  None: no history."""
    wanted = _bucket(pairs)
    for bucket in range(wanted, -1, -1):
        known = latencies[bucket]
        if known is not None:
            return known.bound_s * (1 << (wanted - bucket))
    return next((known.bound_s for known in latencies[wanted:] if known is not None), None)
