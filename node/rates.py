"""How much one sender may cause here: a token bucket for each, and a bounded number of buckets.

Pure: `now` is an argument.  Law: a sender that floods uses up its own bucket and nobody else's; of more senders than
there are buckets, the one that was heard longest ago is forgotten, and begins again with a full one.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable

K = TypeVar("K", bound="Hashable")


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class Rates(Generic[K]):
    """`per_s` in the long run, `burst` at once, for each of at most `senders_max`."""

    def __init__(self, per_s: float, burst: float, senders_max: int) -> None:
        self._per_s = per_s
        self._burst = burst
        self._senders_max = senders_max
        self._buckets: OrderedDict[K, _Bucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, sender: K, now: float, cost: float = 1.0) -> bool:
        """Whether the sender may; if so it is counted."""
        bucket = self._buckets.get(sender)
        if bucket is None:
            bucket = self._buckets[sender] = _Bucket(self._burst, now)
            if len(self._buckets) > self._senders_max:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(sender)
            bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._per_s)
            bucket.filled_at = now
        if bucket.tokens < cost:
            return False
        bucket.tokens -= cost
        return True
