"""Links to nodes that take every stream, keep what comes and answer nothing."""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Any

from protos.errors import PeerLost

if TYPE_CHECKING:
    from collections.abc import Iterator

    import node.link
    from protos.ids import PeerId

WAIT_S = 20.0


class Call:
    """A stream without replies, that ends when it is cancelled or its requests are over."""

    taken: queue.SimpleQueue[Any] = queue.SimpleQueue()
    """What came on all of them."""

    def __init__(self, requests: Iterator[Any], *, metadata: object = None) -> None:
        self._over = threading.Event()
        self._requests = requests
        threading.Thread(target=self._take).start()

    def __iter__(self) -> Iterator[Any]:
        assert self._over.wait(WAIT_S)
        return iter(())

    def cancel(self) -> bool:
        self._over.set()
        return True

    def _take(self) -> None:
        for request in self._requests:
            self.taken.put(request)
        self._over.set()


def held_open(link: node.link.Link, lane: node.link.Lane, method: str, *said: bytes) -> Any:
    """A real stream of this method, on which that is said, and then nothing until it ends."""

    def requests() -> Iterator[bytes]:
        yield from said
        done.wait(WAIT_S)

    done = threading.Event()
    call = link.channel(lane).stream_stream(method)(requests(), metadata=link.metadata())
    call.add_callback(done.set)
    return call


class Link:
    def channel(self, lane: object) -> None: ...

    def metadata(self) -> None: ...


class Links:
    """`reachable`: whether anybody is there.  While `open` is clear nothing comes through, and nobody knows."""

    def __init__(self) -> None:
        self.reachable = True
        self.open = threading.Event()
        self.open.set()

    def to(self, peer: PeerId, address: str) -> Any:
        assert self.open.wait(WAIT_S)
        if not self.reachable:
            raise PeerLost(f"nobody is at {address}")
        return Link()
