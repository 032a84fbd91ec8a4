"""Streams that are open here: so many in all, and two of a kind for each caller.

Law: the one too many is refused at once, and no caller takes the places of the others.
"""

from __future__ import annotations

import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from protos.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protos.ids import PeerId

STREAMS_OF_A_PEER_MAX: Final = 2
"""Of one kind: a caller needs one, and a new one may begin before the end of the old one is noticed."""
RETRY_AFTER_S: Final = 1.0


class Turnstile:
    """`what` the streams carry, as errors say it."""

    def __init__(self, streams_max: int, what: str) -> None:
        self._streams_max = streams_max
        self._what = what
        self._open: Counter[tuple[str, PeerId]] = Counter()
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Streams that are open now."""
        return self._open.total()

    @contextmanager
    def one(self, caller: PeerId, kind: str = "") -> Iterator[None]:
        """A block in which a stream of the caller is open.  Raises Overloaded."""
        with self._lock:
            if self._open[kind, caller] >= STREAMS_OF_A_PEER_MAX:
                raise Overloaded(
                    f"this node takes {STREAMS_OF_A_PEER_MAX} streams of {self._what} from one caller at a time",
                    retry_after_s=RETRY_AFTER_S,
                )
            if self.count >= self._streams_max:
                raise Overloaded(
                    f"this node takes {self._streams_max} streams of {self._what}, and they are all open",
                    retry_after_s=RETRY_AFTER_S,
                )
            self._open[kind, caller] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[kind, caller] -= 1
                if not self._open[kind, caller]:
                    del self._open[kind, caller]
