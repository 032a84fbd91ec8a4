"""The services Stage and Door over gRPC: thin skins over the host of this node's stages and its door's mail.

Law: streams hold threads of their own and are counted, the one too many is refused at once; a short call waits for the
computing thread between two batches, and never for the network.  Steps and results are answered only with refusals.
"""

from __future__ import annotations

import threading
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc

from node.pickup import Reader
from node.refusal import bug, refusing
from node.stage_wire import read_epoch, read_result, refusal_message, short_epoch
from node.turnstile import Turnstile
from protos import messages
from protos import stage_pb2 as pb
from protos.errors import DeadlineExceeded, ShoalError
from protos.ids import SessionId
from protos.limits import ID_CHARS_MAX
from protos.stage_pb2_grpc import (
    DoorServicer,
    StageServicer,
    add_DoorServicer_to_server,
    add_StageServicer_to_server,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future, ThreadPoolExecutor

    from node.mail import Mail
    from node.stage_host import StageHost
    from protos.ids import PeerId

T = TypeVar("T")

# Of a call without a deadline of its own: as long as a door waits for one (node.stages).
CALL_S = 10.0


@dataclass(frozen=True, slots=True)
class Lanes:
    """Where the handlers run.  `streams` needs some threads more than `streams_max`, for refusals."""

    streams: ThreadPoolExecutor
    work: ThreadPoolExecutor
    streams_max: int  # Steps, Deliver and Results together


class StageServices:
    """Both services.  `caller` says who calls, or raises Unauthenticated."""

    def __init__(
        self, host: StageHost, mail: Mail, lanes: Lanes, caller: Callable[[grpc.ServicerContext], PeerId]
    ) -> None:
        self._streams = Turnstile(lanes.streams_max, "steps and results")
        self._stage = _Stage(host, lanes, self._streams, caller)
        self._door = _Door(host, mail, lanes, self._streams, caller)

    @property
    def streams(self) -> int:
        """Streams that are open now."""
        return self._streams.count

    def add_to(self, server: grpc.Server) -> None:
        add_StageServicer_to_server(cast("StageServicer", self._stage), server)
        add_DoorServicer_to_server(cast("DoorServicer", self._door), server)


class _Call:
    """A short method with a thread pool of its own: grpc looks for that attribute."""

    def __init__(self, method: Callable[[Any, grpc.ServicerContext], Any], pool: ThreadPoolExecutor) -> None:
        self._method = method
        self.experimental_thread_pool = pool

    def __call__(self, request: Any, context: grpc.ServicerContext) -> Any:
        with refusing(context, "stage"):
            return self._method(request, context)


class _Stream:
    """A streaming method with a thread pool of its own."""

    def __init__(self, method: Callable[[Any, grpc.ServicerContext], Iterator[Any]], pool: ThreadPoolExecutor) -> None:
        self._method = method
        self.experimental_thread_pool = pool

    def __call__(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with refusing(context, "stage"):
            yield from self._method(requests, context)


class _Stage:
    """What add_StageServicer_to_server takes."""

    def __init__(
        self, host: StageHost, lanes: Lanes, count: Turnstile, caller: Callable[[grpc.ServicerContext], PeerId]
    ) -> None:
        self._host = host
        self._count = count
        self._caller = caller
        self.Open = _Call(self._open, lanes.work)
        self.RaiseEpoch = _Call(self._raise_epoch, lanes.work)
        self.Truncate = _Call(self._truncate, lanes.work)
        self.Close = _Call(self._close, lanes.work)
        self.Steps = _Stream(self._steps, lanes.streams)
        self.Results = _Stream(self._results, lanes.streams)

    def _open(self, request: pb.OpenRequest, context: grpc.ServicerContext) -> pb.OpenReply:
        caller = self._caller(context)
        opening = self._host.open(request, caller)
        try:
            return pb.OpenReply(held=_wait(opening, context))
        except DeadlineExceeded:
            # It may be opened yet, and its door counts on nothing here.
            self._host.close(SessionId(request.session_id), read_epoch(request.epoch), caller)
            raise

    def _raise_epoch(self, request: pb.RaiseEpochRequest, context: grpc.ServicerContext) -> pb.RaiseEpochReply:
        return pb.RaiseEpochReply(held=_wait(self._host.raise_epoch(request, self._caller(context)), context))

    def _truncate(self, request: pb.TruncateRequest, context: grpc.ServicerContext) -> pb.TruncateReply:
        return pb.TruncateReply(held=_wait(self._host.truncate(request, self._caller(context)), context))

    def _close(self, request: pb.CloseRequest, context: grpc.ServicerContext) -> pb.CloseReply:
        session = SessionId(request.session_id)
        _wait(self._host.close(session, read_epoch(request.epoch), self._caller(context)), context)
        return pb.CloseReply()

    def _steps(self, steps: Iterator[pb.Step], context: grpc.ServicerContext) -> Iterator[pb.StepAck]:
        caller = self._caller(context)
        with self._count.one(caller, "Steps"):
            for step in _until_broken(steps):
                try:
                    self._host.take(step, caller)
                except ShoalError as error:
                    yield pb.StepAck(
                        session_id=step.session_id[:ID_CHARS_MAX],
                        epoch=short_epoch(step.epoch),
                        start=step.start,
                        refused=messages.failed(error),
                    )

    def _results(self, refusals: Iterator[pb.DeliverRefusal], context: grpc.ServicerContext) -> Iterator[pb.StepResult]:
        caller, reader = self._caller(context), Reader()
        with self._count.one(caller, "Results"):
            results = self._host.results(caller, reader)
            try:
                listening = threading.Thread(target=self._listen, args=(refusals, caller, reader), daemon=True)
                listening.start()
                yield from results
                if reader.failed is not None:
                    raise reader.failed
            finally:
                self._host.end_results(caller, reader)

    def _listen(self, refusals: Iterator[pb.DeliverRefusal], door: PeerId, reader: Reader) -> None:
        """In a thread of its own, since the stream's waits for results: until the door is gone, or has finished."""
        try:
            for refusal in _until_broken(refusals):
                self._host.refused(door, refusal)
        except ShoalError as error:
            reader.failed = error
        except Exception as error:  # noqa: BLE001  (our bug: it must end this stream, and be told)
            reader.failed = bug("stage", error)
        finally:
            self._host.end_results(door, reader)


class _Door:
    """What add_DoorServicer_to_server takes."""

    def __init__(
        self,
        host: StageHost,
        mail: Mail,
        lanes: Lanes,
        count: Turnstile,
        caller: Callable[[grpc.ServicerContext], PeerId],
    ) -> None:
        self._manifest = host.manifest
        self._mail = mail
        self._count = count
        self._caller = caller
        self.Deliver = _Stream(self._deliver, lanes.streams)

    def _deliver(self, results: Iterator[pb.StepResult], context: grpc.ServicerContext) -> Iterator[pb.DeliverRefusal]:
        caller = self._caller(context)
        with self._count.one(caller, "Deliver"):
            self._mail.joined(caller)
            finished = False
            try:
                for result in results:
                    try:
                        self._mail.take(caller, read_result(result, self._manifest))
                    except ShoalError as error:
                        yield refusal_message(result, error)
                finished = True
            except grpc.RpcError:  # that its other end is gone is an end like any other
                pass
            finally:
                self._mail.left(caller, lost=not finished)


def _until_broken(items: Iterator[T]) -> Iterator[T]:
    """A stream's items; that its other end is gone is an end like any other."""
    try:
        yield from items
    except grpc.RpcError:
        return


def _wait(future: Future[T], context: grpc.ServicerContext) -> T:
    """Until its caller's deadline.  Raises what the future does, and DeadlineExceeded."""
    left = context.time_remaining()
    try:
        return future.result(CALL_S if left is None else left)
    except FutureTimeout:
        raise DeadlineExceeded("the stage is still busy with another batch") from None
