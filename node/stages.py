"""Calls to the stages of a route, here or at another node: open, raise the epoch, ask what is held, close.

Law: every call has a deadline, and no task of trio's waits in it: what comes of it is a Future.  A stage that was asked
to open is closed, also where the answer to that never came.  Errors of other nodes say whose they are.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from node import futures, log
from node.stage_wire import epoch_message, named
from protos import stage_pb2 as pb
from protos.errors import Fenced, Gap, Overloaded, ShoalError, ShuttingDown
from protos.limits import LOG_TOKENS_MAX
from protos.stage_pb2_grpc import StageStub

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

    import grpc

    from node.link import Links
    from node.stage_host import StageHost
    from protos.epoch import Epoch
    from protos.ids import PeerId, SessionId

Q = TypeVar("Q")
R = TypeVar("R")
T = TypeVar("T")

# Reserving KV waits for the batch that runs at the stage, not more.
OPEN_S = 10.0
# Whoever does not say within this what it holds is not well.
ASK_S = 2.0
CLOSE_S = 5.0
# A stage that cannot be reached is asked again to close after so many seconds each; it also frees what its door forgot.
CLOSE_RETRIES_S = (1.0, 5.0)
# Calls to other nodes that are under way at once, and that wait for a thread.
THREADS = 32
CALLS_MAX = 2048


@dataclass(frozen=True, slots=True)
class At:
    """Where a stage is."""

    peer: PeerId
    address: str


class Stages:
    """One for a node's door."""

    def __init__(self, host: StageHost, links: Links) -> None:
        self._host = host
        self._links = links
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="shoal-stage-call")
        # Closing what cannot be reached may take long, and must not keep new sessions from opening.
        self._closers = ThreadPoolExecutor(4, thread_name_prefix="shoal-stage-close")
        self._room = threading.BoundedSemaphore(CALLS_MAX)
        self._leaving = threading.Event()

    def is_here(self, at: At) -> bool:
        return at.peer == self._host.me

    def open(self, at: At, request: pb.OpenRequest) -> Future[int]:
        """Positions held."""
        if self.is_here(at):
            return _local(partial(self._host.open, request))
        return self._submit(self._pool, lambda: int(self._call(at, lambda stub: stub.Open, request, OPEN_S).held))

    def raise_epoch(self, at: At, request: pb.RaiseEpochRequest) -> Future[int]:
        """Positions held."""
        if self.is_here(at):
            return _local(partial(self._host.raise_epoch, request))
        return self._submit(self._pool, lambda: int(self._call(at, lambda stub: stub.RaiseEpoch, request, OPEN_S).held))

    def held(self, at: At, session: SessionId, epoch: Epoch) -> Future[int]:
        """Positions held, asked without changing anything: a truncation to a position that no stage holds."""
        request = pb.TruncateRequest(session_id=session, epoch=epoch_message(epoch), position=LOG_TOKENS_MAX + 1)
        if self.is_here(at):
            asked = _local(partial(self._host.truncate, request))
        else:
            asked = self._submit(
                self._pool, lambda: int(self._call(at, lambda stub: stub.Truncate, request, ASK_S).held)
            )
        return futures.mapped(asked, int, _held_in)

    def close(self, at: At, session: SessionId, epoch: Epoch, after: Future[int] | None = None) -> Future[None]:
        """Frees the session there, in the background; `after` is the open or raise that may still be under way."""
        request = pb.CloseRequest(session_id=session, epoch=epoch_message(epoch))

        def begin(_: BaseException | None = None) -> Future[None]:
            if self.is_here(at):
                return _local(partial(self._host.close, session, epoch))
            return self._submit(self._closers, partial(self._close, at, request))

        return begin() if after is None else futures.after(after, begin)

    def shutdown(self) -> None:
        """Waits for the calls under way; what is closed then is tried once.  Blocks for some seconds at most."""
        self._leaving.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._closers.shutdown(wait=True)

    def _submit(self, pool: ThreadPoolExecutor, call: Callable[[], T]) -> Future[T]:
        if not self._room.acquire(blocking=False):
            return futures.failed(Overloaded(f"{CALLS_MAX} calls to other nodes wait here", retry_after_s=1.0))
        try:
            future = pool.submit(call)
        except RuntimeError:  # the pool has ended
            self._room.release()
            return futures.failed(ShuttingDown("this node is shutting down"))
        future.add_done_callback(lambda _: self._room.release())
        return future

    def _call(
        self,
        at: At,
        method: Callable[[StageStub], grpc.UnaryUnaryMultiCallable[Q, R]],
        request: Q,
        timeout_s: float,
    ) -> R:
        try:
            link = self._links.to(at.peer, at.address)
            return link.call(lambda channel: method(StageStub(channel)), request, timeout_s=timeout_s)
        except ShoalError as error:
            raise named(error, at.peer, at.address) from error

    def _close(self, at: At, request: pb.CloseRequest) -> None:
        for pause_s in (*CLOSE_RETRIES_S, None):
            try:
                self._call(at, lambda stub: stub.Close, request, CLOSE_S)
                return
            except ShoalError as error:
                if isinstance(error, Fenced) or pause_s is None or self._leaving.wait(pause_s):
                    log.get("door").info("a stage could not be closed", session=request.session_id, error=str(error))
                    raise


def _local(work: Callable[[], Future[T]]) -> Future[T]:
    try:
        return work()
    except ShoalError as error:
        return futures.failed(error)


def _held_in(error: BaseException) -> int | None:
    return error.held if isinstance(error, Gap) else None
