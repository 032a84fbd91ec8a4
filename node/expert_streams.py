"""One stream of expert calls to each peer, and what is known of it: ready, beyond its deadline, or broken.

Used by the thread that computes, which never waits here: peers are connected to in the streams' own threads, and what
happens there comes through `inbox`.  Law: a call is answered, failed or given up once; a reply to a call that was not
made ends the stream; a stream with a call beyond its deadline gets no other until that is answered.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from node.duplex import Duplex, close_all
from node.link import Lane
from protos.errors import InvalidRequest, Overloaded, PeerLost, ShoalError, ShuttingDown, Unauthenticated, Unavailable
from protos.expert_pb2_grpc import ExpertStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from node.duplex import StreamCall
    from node.link import Links
    from protos import expert_pb2 as pb
    from protos.ids import PeerId

    Encode = Callable[[], pb.ComputeRequest]

# Each has three threads.
STREAMS_MAX = 256
# Calls of one layer to one peer: only frames beyond their limit make more than one.
QUEUE_MAX = 64
# A peer that cannot be reached is tried again after so long, twice as long each time.
RETRY_S = 0.1
RETRY_S_MAX = 2.0
# To see which certificate it shows then.
CHECK_S = 2.0


@dataclass(slots=True, eq=False)
class Call:
    """A call that was sent.  `deadline`: when another replica is asked, if there is one."""

    number: int
    peer: PeerId
    pairs: int
    sent_at: float
    deadline: float
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class Ready:
    peer: PeerId


@dataclass(frozen=True, slots=True)
class Replied:
    """`at`: when the reply came, which may be long before anybody looks."""

    call: Call
    reply: pb.ComputeReply
    at: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The stream is over; these calls have no answer.  `is_ours`: this side ended it, for no fault of the peer's."""

    peer: PeerId
    error: ShoalError
    calls: tuple[Call, ...]
    is_ours: bool = False


Event: TypeAlias = Ready | Replied | Ended
_Item: TypeAlias = tuple["_Lane", "pb.ComputeReply | ShoalError | None", float]


class _Started(Protocol):
    """What gRPC gives for a stream."""

    def __iter__(self) -> Iterator[pb.ComputeReply]: ...

    def initial_metadata(self) -> object: ...

    def is_active(self) -> bool: ...

    def cancel(self) -> bool: ...


class _Announced:
    """A stream whose reader hears first that the peer has begun to read.

    gRPC's keepalive bounds the wait for a peer that is gone, and `cancel` the one for a peer that never says so.
    """

    def __init__(self, call: _Started, on_ready: Callable[[], None]) -> None:
        self._call = call
        self._on_ready = on_ready

    def __iter__(self) -> Iterator[pb.ComputeReply]:
        self._call.initial_metadata()
        if self._call.is_active():  # or it was refused
            self._on_ready()
        yield from self._call

    def cancel(self) -> bool:
        return self._call.cancel()


@dataclass(slots=True, eq=False)
class _Lane:
    peer: PeerId
    stream: Duplex[pb.ComputeRequest, pb.ComputeReply] | None = None
    is_ready: bool = False
    misses: int = 0  # streams in a row that gave no reply
    retry_at: float = 0.0
    fault: ShoalError | None = None  # why this side ends it
    is_dropped: bool = False  # or that nobody needs it
    calls: dict[int, Call] = field(default_factory=dict)


class ExpertStreams:
    def __init__(self, links: Links) -> None:
        self._links = links
        self._lanes: dict[PeerId, _Lane] = {}
        self._inbox: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._numbers = itertools.count(1)
        self.closed = False

    def connect(self, peer: PeerId, address: str, now: float) -> None:
        """Begins a stream where there is none, unless the last try was a moment ago.  Raises Unavailable."""
        lane = self._lanes.get(peer)
        if lane is not None and (lane.stream is not None or now < lane.retry_at):
            return
        if self.closed:
            raise ShuttingDown("this node is leaving, and asks nobody")
        if lane is None:
            if len(self._lanes) >= STREAMS_MAX:
                raise Overloaded(f"this node asks {STREAMS_MAX} peers for experts, and no more", retry_after_s=1.0)
            lane = self._lanes[peer] = _Lane(peer)
        lane.stream = Duplex(
            partial(self._start, lane, address),
            partial(self._put, lane),
            partial(self._ended, lane, address),
            queue_max=QUEUE_MAX,
            name=f"{address} (peer {peer[:8]})",
        )

    def is_free(self, peer: PeerId, now: float) -> bool:
        """Connected, and no call of it is beyond its deadline."""
        lane = self._lanes.get(peer)
        return lane is not None and lane.is_ready and not self._overdue(lane, now)

    def send(self, peer: PeerId, pairs: int, deadline_s: float, now: float, encode: Callable[[int], Encode]) -> Call:
        """Sends a call, which waits if the stream is just being made.  Raises Unavailable, at once."""
        lane = self._lanes.get(peer)
        if lane is None or lane.stream is None:
            raise PeerLost(f"the peer {peer[:8]} is not connected")
        if self._overdue(lane, now):
            raise Unavailable(f"the peer {peer[:8]} has not answered an earlier call")
        if len(lane.calls) >= QUEUE_MAX:
            raise Overloaded(f"the peer {peer[:8]} has {QUEUE_MAX} calls to answer")
        call = Call(next(self._numbers), peer, pairs, now, now + deadline_s)
        lane.stream.send(encode(call.number))
        lane.calls[call.number] = call
        return call

    def wait(self, timeout_s: float) -> Event | None:
        """The next thing that happened; None after `timeout_s`."""
        try:
            lane, said, at = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            return None
        return self._take(lane, said, at)

    def has_news(self) -> bool:
        return not self._inbox.empty()

    def peers(self) -> list[PeerId]:
        return list(self._lanes)

    def drop(self, peer: PeerId) -> None:
        """Ends the stream to a peer that holds nothing any more."""
        lane = self._lanes.get(peer)
        if lane is not None and lane.stream is not None:
            lane.is_dropped = True
            lane.stream.close()
        elif lane is not None:
            del self._lanes[peer]

    def fault(self, peer: PeerId, error: ShoalError) -> None:
        """Ends the stream to a peer that broke the protocol; what it still has to answer fails with this error."""
        lane = self._lanes.get(peer)
        if lane is not None and lane.stream is not None:
            lane.fault = error
            lane.stream.close()

    def close(self, timeout_s: float = 5.0) -> None:
        """From any thread: ends all streams, and waits for their threads."""
        self.closed = True
        close_all([lane.stream for lane in list(self._lanes.values()) if lane.stream is not None], timeout_s)

    def _take(self, lane: _Lane, said: pb.ComputeReply | ShoalError | None, at: float) -> Event | None:
        if said is None:
            lane.is_ready = True
            return Ready(lane.peer)
        if isinstance(said, ShoalError):
            return self._over(lane, said)
        call = lane.calls.pop(said.call, None)
        if call is None:
            self.fault(lane.peer, InvalidRequest(f"the peer {lane.peer[:8]} answered a call that was not made"))
            return None
        lane.misses = 0
        return Replied(call, said, at)

    def _over(self, lane: _Lane, error: ShoalError) -> Ended:
        calls = tuple(lane.calls.values())
        lane.calls.clear()
        is_ours = lane.fault is None and isinstance(error, ShuttingDown) and (lane.is_dropped or self.closed)
        ended = Ended(lane.peer, lane.fault or error, calls, is_ours)
        if lane.is_dropped:
            del self._lanes[lane.peer]
        lane.stream, lane.is_ready, lane.fault = None, False, None
        lane.retry_at = time.monotonic() + min(RETRY_S * 2.0**lane.misses, RETRY_S_MAX)
        lane.misses = min(lane.misses + 1, 16)
        return ended

    @staticmethod
    def _overdue(lane: _Lane, now: float) -> bool:
        return any(call.is_late or call.deadline <= now for call in lane.calls.values())

    # In the stream's own thread.

    def _start(self, lane: _Lane, address: str, requests: Iterator[pb.ComputeRequest]) -> StreamCall[pb.ComputeReply]:
        if lane.misses:
            self._links.check(lane.peer, CHECK_S)  # one that restarted shows another certificate
        link = self._links.to(lane.peer, address)
        call = ExpertStub(link.channel(Lane.EXPERTS)).Compute(requests, metadata=link.metadata())
        return _Announced(cast("_Started", call), partial(self._put, lane, None))

    def _put(self, lane: _Lane, said: pb.ComputeReply | ShoalError | None) -> None:
        self._inbox.put((lane, said, time.monotonic()))

    def _ended(self, lane: _Lane, address: str, error: ShoalError) -> None:
        if isinstance(error, Unauthenticated):
            with contextlib.suppress(ShoalError):  # then there is no link, and the next one is new
                self._links.to(lane.peer, address).renew()
        self._put(lane, error)
