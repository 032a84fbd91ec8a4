"""That an answer's node still works on it, where there is nothing else to say: sent by the door.

Law: a heartbeat comes from where the answer is driven, so a node whose answers are stuck has none; none comes after an
answer's end, and none waits for a client that does not read.  PROTOCOL.md, section 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from node.silence import HEARTBEAT_S
from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from node.bridge import Stream


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
