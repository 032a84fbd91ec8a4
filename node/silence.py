"""An answer of which nothing is heard any more, at its client.  PROTOCOL.md, section 7.

Law: heartbeats are wanted while somebody waits, and only then.  Imports no trio: a client of a running node is light.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

    import grpc

HEARTBEAT_S: Final = 5.0
SILENCE_S: Final = 6 * HEARTBEAT_S
"""Several heartbeats that do not come: a busy machine may be late with one."""


class Silence:
    """Of one answer, at its client: cancels a call of which nothing is heard for `silence_s` while somebody waits."""

    def __init__(self, call: grpc.Call, silence_s: float) -> None:
        self.passed = False
        self._call = call
        self._silence_s = silence_s
        self._waiting_since: float | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="shoal-silence", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def wait(self) -> None:
        """From now on somebody waits for the next event."""
        self._waiting_since = time.monotonic()

    def heard(self) -> None:
        """It has come; what its reader does with it takes as long as it likes."""
        self._waiting_since = None

    def _watch(self) -> None:
        while not self._over.wait(self._left_s()):
            if self._left_s() <= 0:
                self.passed = True
                self._call.cancel()
                return

    def _left_s(self) -> float:
        since = self._waiting_since
        return self._silence_s if since is None else since + self._silence_s - time.monotonic()
