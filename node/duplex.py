"""One long stream to a peer: messages out through a bounded queue, replies to a callback in a thread of its own.

Law: `send` and `close` never block, and nothing that was accepted is lost in silence: `on_end` says, once, that the
stream is over and why.  Whoever needs an answer keeps what he sent until then.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import grpc

from node.status import from_rpc
from protos.errors import BrokenInvariant, Overloaded, PeerLost, ShoalError, ShuttingDown

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

Q = TypeVar("Q")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

RETRY_AFTER_S = 0.1
FINISH_S = 5.0


class StreamCall(Protocol[R_co]):
    """What gRPC gives for a stream of requests with a stream of replies."""

    def __iter__(self) -> Iterator[R_co]: ...

    def cancel(self) -> bool: ...


class _End:
    pass


class Duplex(Generic[Q, R]):
    """A stream that begins at once, in its own thread: `start` may connect and say Hello there, and may fail.

    name: the peer and its address, as errors and the thread's name say it.
    """

    def __init__(
        self,
        start: Callable[[Iterator[Q]], StreamCall[R]],
        on_reply: Callable[[R], None],
        on_end: Callable[[ShoalError], None],
        *,
        queue_max: int,
        name: str,
    ) -> None:
        self._start = start
        self._on_reply = on_reply
        self._on_end = on_end
        self._queue_max = queue_max
        self._name = name
        self._queue: queue.SimpleQueue[Q | Callable[[], Q] | _End] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._alive = True
        self._call: StreamCall[R] | None = None
        self._reason: ShoalError | None = None  # why this side ended it
        self._broken = False  # and did not wait for the other
        self._over = False
        self._patience: threading.Timer | None = None  # with the other side, once this one has finished
        self._thread = threading.Thread(target=self._run, name=f"shoal-duplex {name}", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once it has ended; `on_end` has been called by then, or is about to be."""
        return self._alive

    def send(self, item: Q | Callable[[], Q]) -> None:
        """Queues a message; a callable is called in the sending thread, so that encoding is not the caller's time.

        Raises Overloaded when the queue is full, PeerLost when the stream has ended.
        """
        with self._lock:
            if not self._alive:
                raise PeerLost(f"the stream to {self._name} has ended")
            if self._queue.qsize() >= self._queue_max:
                raise Overloaded(
                    f"{self._queue_max} messages to {self._name} wait to be sent", retry_after_s=RETRY_AFTER_S
                )
            self._queue.put(item)

    def close(self) -> None:
        """Ends the stream; what is still queued is not sent.  May be repeated."""
        self._break(ShuttingDown(f"the stream to {self._name} was closed on this side"))

    def finish(self) -> None:
        """Sends what is queued and no more; the stream ends when the other side has taken note, or FINISH_S later.

        May be repeated.
        """
        with self._lock:
            self._reason = self._reason or ShuttingDown(f"the stream to {self._name} was finished on this side")
            self._alive = False
            self._queue.put(_End())
            if self._patience is None and not self._over:
                self._patience = threading.Timer(FINISH_S, self.close)
                self._patience.daemon = True
                self._patience.start()

    def join(self, timeout_s: float) -> bool:
        """Waits until `on_end` has returned; False if that took too long."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            error = self._read()
        except Exception as raised:  # noqa: BLE001  (our bug: whoever waits on this stream must hear of it)
            self._cancel()
            error = _bug(self._name, raised)
        with self._lock:
            self._alive = False
            self._over = True
            self._queue.put(_End())
            if self._patience is not None:
                self._patience.cancel()
        self._on_end(self._reason or error)

    def _read(self) -> ShoalError:
        """Gives every reply to the callback; returns why there are no more."""
        try:
            call = self._start(self._outgoing())
            with self._lock:
                self._call = call
            if self._broken:  # while it started: nobody else will cancel it
                call.cancel()
            for reply in call:
                self._on_reply(reply)
        except grpc.RpcError as error:
            return from_rpc(error, self._name)
        except ShoalError as error:
            self._cancel()
            return error
        except Exception as error:  # noqa: BLE001  (our bug: it must end this stream, and be told)
            self._cancel()
            return _bug(self._name, error)
        return PeerLost(f"{self._name} ended the stream")

    def _outgoing(self) -> Iterator[Q]:
        """Runs in the thread in which gRPC sends."""
        while not isinstance(item := self._queue.get(), _End):
            try:
                message = item() if callable(item) else item
            except Exception as error:  # noqa: BLE001  (our bug: it must end this stream, and be told)
                self._break(error if isinstance(error, ShoalError) else _bug(self._name, error))
                return
            yield message

    def _break(self, reason: ShoalError) -> None:
        with self._lock:
            self._reason = self._reason or reason
            self._broken = True
            self._alive = False
            self._queue.put(_End())
        self._cancel()

    def _cancel(self) -> None:
        with self._lock:
            call = self._call
        if call is not None:
            with contextlib.suppress(Exception):  # gRPC's own, when the channel was closed under the call
                call.cancel()


def close_all(streams: Collection[Duplex[Any, Any]], timeout_s: float) -> None:
    """Ends them, and waits for all of their threads together."""
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + timeout_s
    for stream in streams:
        stream.join(max(0.0, deadline - time.monotonic()))


def _bug(name: str, error: Exception) -> ShoalError:
    named = BrokenInvariant(f"the stream to {name} failed here: {type(error).__name__}: {error}")
    named.__cause__ = error
    return named
