"""The service Expert: rows of other nodes' stages through the experts that are held here.  PROTOCOL.md, section 10.

Law: a leaf.  It keeps nothing between calls and calls nobody.  Each caller's stream holds a thread, in which its calls
are computed, one at a time over all streams; streams and waiting calls are counted, and one too many is refused.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch

from node.expert_wire import ExpertWire
from node.refusal import bug, refusing
from node.turnstile import Turnstile
from protos import expert_pb2 as pb
from protos import messages
from protos.errors import DeadlineExceeded, Overloaded, ShoalError
from protos.expert_pb2_grpc import ExpertServicer, add_ExpertServicer_to_server
from protos.limits import FRAME_BYTES_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import ThreadPoolExecutor

    import grpc

    from protos.ids import PeerId
    from protos.manifest import Manifest
    from shard.experts import ExpertBank

# A call that says no limit waits so long for its turn.
WAIT_S_MAX = 30.0
RETRY_AFTER_S = 1.0


class ExpertService:
    """`caller` says who calls, or raises Unauthenticated; `pool` needs threads beyond `streams_max`, for refusals."""

    def __init__(
        self,
        manifest: Manifest,
        bank: ExpertBank,
        caller: Callable[[grpc.ServicerContext], PeerId],
        *,
        pool: ThreadPoolExecutor | None = None,
        streams_max: int = 64,
        queue_max: int = 256,
        frame_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:
        self._wire = ExpertWire(manifest, frame_bytes_max=frame_bytes_max)
        self._bank = bank
        self._caller = caller
        self._pool = pool
        self._streams = Turnstile(streams_max, "expert calls")
        self._turns = _Turns(queue_max)

    @property
    def streams(self) -> int:
        """Streams that are open now."""
        return self._streams.count

    def add_to(self, server: grpc.Server) -> None:
        add_ExpertServicer_to_server(cast("ExpertServicer", _Methods(self, self._pool)), server)

    def compute(
        self, requests: Iterable[pb.ComputeRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ComputeReply]:
        """Answers a stream's calls in order; that it begins tells the caller that calls will be read."""
        with refusing(context, "experts"), self._streams.one(self._caller(context)):
            context.send_initial_metadata(())
            for request in requests:
                yield self._answer(request)

    def _answer(self, request: pb.ComputeRequest) -> pb.ComputeReply:
        failed: ShoalError
        try:
            with torch.inference_mode():
                return self._computed(request)
        except ShoalError as error:
            failed = error
        except Exception as error:  # noqa: BLE001  (a bug in one call must not end its caller's stream)
            failed = bug("experts", error)
        return pb.ComputeReply(call=request.call, failed=messages.failed(failed))

    def _computed(self, request: pb.ComputeRequest) -> pb.ComputeReply:
        read_at = time.perf_counter()
        hidden, part = self._wire.read(request, self._bank)
        arrived = time.perf_counter()
        with self._turns.one(request.wait_ms_max / 1000 or WAIT_S_MAX):
            began = time.perf_counter()
            rows = self._bank.rows(request.layer, hidden.to(self._bank.device), part)
            ended = time.perf_counter()
        reply = self._wire.reply(request.call, part, rows)
        reply.waited_us, reply.compute_us = int((began - arrived) * 1e6), int((ended - began) * 1e6)
        reply.served_us = int((time.perf_counter() - read_at) * 1e6)
        return reply


class _Turns:
    """One call computes at a time: two at once would only share the same cores, and each take twice as long."""

    def __init__(self, queue_max: int) -> None:
        self._queue_max = queue_max
        self._turn = threading.Lock()
        self._lock = threading.Lock()
        self._waiting = 0

    @contextmanager
    def one(self, wait_s: float) -> Iterator[None]:
        if not self._turn.acquire(blocking=False):
            self._wait(min(wait_s, WAIT_S_MAX))
        try:
            yield
        finally:
            self._turn.release()

    def _wait(self, wait_s: float) -> None:
        with self._lock:
            if self._waiting >= self._queue_max:
                raise Overloaded(f"{self._queue_max} expert calls wait here", retry_after_s=RETRY_AFTER_S)
            self._waiting += 1
        try:
            if not self._turn.acquire(timeout=wait_s):
                raise DeadlineExceeded(f"the call could not begin within {wait_s:.1f} s: this node is busy")
        finally:
            with self._lock:
                self._waiting -= 1


class _Methods:
    """What add_ExpertServicer_to_server takes."""

    def __init__(self, service: ExpertService, pool: ThreadPoolExecutor | None) -> None:
        self.Compute = _Stream(service, pool)


class _Stream:
    """The method with a thread pool of its own: grpc looks for that attribute."""

    def __init__(self, service: ExpertService, pool: ThreadPoolExecutor | None) -> None:
        self._service = service
        if pool is not None:
            self.experimental_thread_pool = pool

    def __call__(
        self, requests: Iterable[pb.ComputeRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.ComputeReply]:
        return self._service.compute(requests, context)
