"""Long streams to other nodes, one to each: made when first used, and again after they ended.

Law: nothing here waits for the network; a stream that cannot be made ends, and says so, in its own thread.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from functools import partial
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from node.duplex import Duplex, close_all
from node.link import Lane
from protos.errors import Overloaded, PeerLost, ShoalError, ShuttingDown, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

    from node.duplex import StreamCall
    from node.link import Links
    from protos.ids import PeerId

Q = TypeVar("Q")
R = TypeVar("R")
Q_contra = TypeVar("Q_contra", contravariant=True)
R_co = TypeVar("R_co", covariant=True)

# Each has a thread of its own, and one or two of gRPC's.
STREAMS_MAX = 256


class Method(Protocol[Q_contra, R_co]):
    """A stub's stream of requests with a stream of replies."""

    def __call__(
        self, requests: Iterator[Q_contra], /, *, metadata: tuple[tuple[str, str], ...] | None = None
    ) -> StreamCall[R_co]: ...


class PeerStreams(Generic[Q, R]):
    """`method` gives a channel's stream; replies and ends are told with their peer, in the stream's thread."""

    def __init__(
        self,
        links: Links,
        method: Callable[[grpc.Channel], Method[Q, R]],
        on_reply: Callable[[PeerId, R], None],
        on_end: Callable[[PeerId, ShoalError], None],
        *,
        queue_max: int,
    ) -> None:
        self._links = links
        self._method = method
        self._on_reply = on_reply
        self._on_end = on_end
        self._queue_max = queue_max
        self._streams: dict[PeerId, tuple[int, Duplex[Q, R]]] = {}
        self._untold: set[int] = set()  # streams whose end is to be told when it comes
        self._finishing: dict[int, Duplex[Q, R]] = {}  # dropped, and the other side has not taken note
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closed = False

    def to(self, peer: PeerId, address: str) -> Duplex[Q, R]:
        """The peer's stream, which may have ended by the time it is used.  Raises Overloaded or ShuttingDown."""
        with self._lock:
            found = self._streams.get(peer)
            if found is None or not found[1].alive:
                found = self._streams[peer] = self._make(peer, address)
            return found[1]

    def send(self, peer: PeerId, item: Q) -> None:
        """On the stream that there is.  Raises PeerLost, Overloaded."""
        with self._lock:  # or a reply that comes while `to` makes the stream could not be answered
            found = self._streams.get(peer)
        if found is None:
            raise PeerLost(f"there is no stream to peer {peer[:8]}")
        found[1].send(item)

    def alive(self, peer: PeerId) -> bool:
        found = self._streams.get(peer)
        return found is not None and found[1].alive

    def drop(self, peer: PeerId) -> None:
        """Finishes the peer's stream, which nobody needs now: no loss, for either side; its end is not told."""
        with self._lock:
            found = self._streams.pop(peer, None)
            if found is not None and found[0] in self._untold:
                self._untold.discard(found[0])
                self._finishing[found[0]] = found[1]
        if found is not None:
            found[1].finish()

    def peers(self) -> list[PeerId]:
        with self._lock:
            return list(self._streams)

    def close(self, timeout_s: float) -> None:
        """Ends all streams, and waits for their threads."""
        with self._lock:
            self._closed = True
            streams = [*(stream for _, stream in self._streams.values()), *self._finishing.values()]
        close_all(streams, timeout_s)

    def _make(self, peer: PeerId, address: str) -> tuple[int, Duplex[Q, R]]:
        if self._closed:
            raise ShuttingDown("this node is shutting down and begins no streams")
        self._streams = {other: found for other, found in self._streams.items() if found[1].alive}
        if len(self._streams) + len(self._finishing) >= STREAMS_MAX:
            raise Overloaded(f"{STREAMS_MAX} streams to other nodes are open already", retry_after_s=1.0)
        number = next(self._numbers)
        self._untold.add(number)
        stream: Duplex[Q, R] = Duplex(
            partial(self._start, peer, address),
            partial(self._on_reply, peer),
            partial(self._ended, peer, address, number),
            queue_max=self._queue_max,
            name=f"peer {peer[:8]} at {address}",
        )
        return number, stream

    def _start(self, peer: PeerId, address: str, requests: Iterator[Q]) -> StreamCall[R]:
        link = self._links.to(peer, address)
        return self._method(link.channel(Lane.STEPS))(requests, metadata=link.metadata())

    def _ended(self, peer: PeerId, address: str, number: int, error: ShoalError) -> None:
        if isinstance(error, Unauthenticated):
            with contextlib.suppress(ShoalError):  # then there is no link, and the next one is new
                self._links.to(peer, address).renew()
        with self._lock:
            is_untold = number in self._untold
            self._untold.discard(number)
            self._finishing.pop(number, None)
        if is_untold:
            self._on_end(peer, error)
