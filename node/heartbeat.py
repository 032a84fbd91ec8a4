"""That an answer's node still works on it, where there is nothing else to say: sent by the door, wanted by the client.

Law: a heartbeat comes from where the answer is driven, so a node whose answers are stuck has none; none comes after an
answer's end, and none waits for a client that does not read.  PROTOCOL.md, section 7.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Self

import trio

from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    import grpc

    from node.bridge import Stream

HEARTBEAT_S: Final = 5.0
SILENCE_S: Final = 6 * HEARTBEAT_S
"""Several heartbeats that do not come: a busy machine may be late with one."""


class Heart:
    """Of one answer, at its door, in trio."""

    def __init__(self, stream: Stream[pb.GenerateEvent]) -> None:
        self._stream = stream
        self._sent_at = trio.current_time()
        self._ended = False

    async def send(self, event: pb.GenerateEvent) -> None:
        self._sent_at = trio.current_time()
        self._ended = event.WhichOneof("event") in ("finished", "failed")
        await self._stream.send(event)

    async def beat_during(self, answer: Callable[[], Awaitable[None]]) -> None:
        """Runs what sends the answer; raises what it does."""
        failed: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            try:
                await answer()
            except Exception as error:  # noqa: BLE001  (or the nursery would wrap it)
                failed = error
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed

    async def _beat(self) -> None:
        while not self._ended:
            await trio.sleep_until(self._sent_at + HEARTBEAT_S)
            if not self._ended and trio.current_time() >= self._sent_at + HEARTBEAT_S:
                self._sent_at = trio.current_time()
                self._stream.offer(pb.GenerateEvent(heartbeat=pb.Heartbeat()))


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
