"""What comes in: each message is waited for, measured and read here, before its handler sees it.

Laws: nothing is parsed that exceeds its service's limit, or that its caller may not send.  A thread waits for a call's
only message MESSAGE_S at most, and CROWDED_S where more than READERS_MAX of a pool's threads wait: silent calls never
hold a pool.  PROTOCOL.md, section 12.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from node.hello import OPEN
from node.refusal import refuse
from protos.errors import FrameTooLarge, InvalidRequest, ShoalError
from protos.limits import (
    EXPERT_MESSAGE_BYTES_MAX,
    HELLO_MESSAGE_BYTES_MAX,
    INFERENCE_MESSAGE_BYTES_MAX,
    PEERS_MESSAGE_BYTES_MAX,
    STAGE_MESSAGE_BYTES_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

# A message of 10 MiB takes 8 s at 10 Mbit/s; who calls waits no longer for an opening, the largest that has a deadline.
MESSAGE_S: Final = 10.0
# Most messages come with the call itself: a round through gRPC's polling thread, however much that has to do.
CROWDED_S: Final = 0.25
READERS_MAX: Final = 16
"""Threads of a pool that wait for messages in peace; a pool has some more."""
_SWEEP_S: Final = 1.0

_OF_SERVICE: Final = {
    "shoal.v1.Inference": INFERENCE_MESSAGE_BYTES_MAX,
    "shoal.v1.Stage": STAGE_MESSAGE_BYTES_MAX,
    "shoal.v1.Door": STAGE_MESSAGE_BYTES_MAX,
    "shoal.v1.Expert": EXPERT_MESSAGE_BYTES_MAX,
    "shoal.v1.Peers": PEERS_MESSAGE_BYTES_MAX,
}
"""Bytes of a service's messages.  HELLO_MESSAGE_BYTES_MAX for what is not listed, and for calls open to everybody."""


def bytes_max(method: str) -> int:
    """Of one message of such a call: `/shoal.v1.Peers/Sync`."""
    if method in OPEN:
        return HELLO_MESSAGE_BYTES_MAX
    return _OF_SERVICE.get(method.rpartition("/")[0].removeprefix("/"), HELLO_MESSAGE_BYTES_MAX)


class Intake(grpc.ServerInterceptor):
    """Innermost but for what must know which calls are streams: to gRPC all calls are, behind this.

    A handler's attribute `admit(context)`, if it has one, refuses before the message is read.
    """

    def __init__(self, *, message_s: float = MESSAGE_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._silent = _Silent(message_s, clock)
        self._sweeper = threading.Thread(target=self._silent.keep_sweeping, name="shoal-intake", daemon=True)

    def start(self) -> None:
        self._sweeper.start()

    def close(self) -> None:
        """After `start`: ends its thread."""
        self._silent.close()
        self._sweeper.join()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = continuation(details)
        if handler is None:
            return None
        method = details.method
        reader = _Reader(method, handler.request_deserializer, bytes_max(method))
        if handler.unary_unary is not None:
            return grpc.stream_unary_rpc_method_handler(
                _UnaryUnary(handler.unary_unary, reader, self._silent), None, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _UnaryStream(handler.unary_stream, reader, self._silent), None, handler.response_serializer
            )
        assert handler.stream_stream is not None, f"no service of ours has a call such as {method}"
        return grpc.stream_stream_rpc_method_handler(
            _StreamStream(handler.stream_stream, reader), None, handler.response_serializer
        )


class _Reader:
    """From bytes to messages of one method, in the handler's thread: gRPC would parse in its only polling one."""

    def __init__(self, method: str, parse: Callable[[bytes], Any] | None, bytes_max: int) -> None:
        self.method = method
        self._parse = parse
        self._bytes_max = bytes_max

    def read(self, data: bytes) -> Any:
        """Raises FrameTooLarge or InvalidRequest."""
        if len(data) > self._bytes_max:
            raise FrameTooLarge(f"a message to {self.method} has {len(data)} bytes; at most {self._bytes_max}")
        if self._parse is None:
            return data
        try:
            return self._parse(data)
        except Exception:  # noqa: BLE001  (protobuf's DecodeError has another class in each of its implementations)
            raise InvalidRequest(f"a message to {self.method} is no such message") from None


class _Silent:
    """Calls whose message has not come, by pool, with when each began."""

    def __init__(self, wait_s: float, clock: Callable[[], float]) -> None:
        self._wait_s = wait_s
        self._clock = clock
        self._lock = threading.Condition()
        self._pools: dict[object, dict[grpc.ServicerContext, float]] = {}
        self._crowded = False
        self._closed = False

    def first(self, requests: Iterator[bytes], context: grpc.ServicerContext, pool: object) -> bytes | None:
        """The call's message; None if it ends without one.  Raises RpcError if it is cancelled meanwhile."""
        with self._lock:
            calls = self._pools.setdefault(pool, {})
            calls[context] = self._clock()
            if len(calls) > READERS_MAX and not self._crowded:
                self._crowded = True
                self._lock.notify()
        try:
            return next(requests, None)
        finally:
            with self._lock:
                calls.pop(context, None)

    def keep_sweeping(self) -> None:
        """Cancels calls that are silent for too long, until `close`."""
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._closed or self._crowded, _SWEEP_S)
                if self._crowded and not self._closed:
                    self._lock.wait_for(lambda: self._closed, CROWDED_S)
                if self._closed:
                    return
                due = self._due()
            for call in due:
                call.cancel()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify()

    def _due(self) -> list[grpc.ServicerContext]:
        now = self._clock()
        due = []
        self._crowded = False
        for calls in self._pools.values():
            wait_s = self._wait_s
            if len(calls) > READERS_MAX:
                self._crowded, wait_s = True, min(wait_s, CROWDED_S)
            for call in [call for call, began in calls.items() if began + wait_s <= now]:
                del calls[call]
                due.append(call)
        return due


class _Handled:
    """A method behind the intake; it keeps the method's thread pool, by the attribute of grpc's."""

    def __init__(self, handle: Callable[..., Any], reader: _Reader) -> None:
        self._handle = handle
        self._reader = reader
        self.experimental_thread_pool = getattr(handle, "experimental_thread_pool", None)


class _Unary(_Handled):
    def __init__(self, handle: Callable[..., Any], reader: _Reader, silent: _Silent) -> None:
        super().__init__(handle, reader)
        self._silent = silent
        self._admit: Callable[[grpc.ServicerContext], None] | None = getattr(handle, "admit", None)

    def _message(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        try:
            if self._admit is not None:
                self._admit(context)
            data = self._silent.first(requests, context, self.experimental_thread_pool)
            if data is None:
                raise InvalidRequest(f"a call of {self._reader.method} came without its message")
            return self._reader.read(data)
        except ShoalError as error:
            refuse(context, error)


class _UnaryUnary(_Unary):
    def __call__(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Any:
        return self._handle(self._message(requests, context), context)


class _UnaryStream(_Unary):
    def __call__(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        yield from self._handle(self._message(requests, context), context)


class _StreamStream(_Handled):
    """What is wrong with a message ends its stream, by way of the handler, which hears it from its iterator."""

    def __call__(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[Any]:
        replies: Iterator[Any] = self._handle(map(self._reader.read, requests), context)
        return replies
