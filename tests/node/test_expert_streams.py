"""Streams of expert calls to peers that do nothing: they end when this side says so (PROTOCOL.md, section 10.2)."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from toy_experts import WAIT_S, ToyLinks
from toy_streams import Links

from node import expert_streams
from node.expert_streams import Ended, ExpertStreams
from node.peer_streams import PeerStreams
from protos.errors import InvalidRequest, Overloaded, ShuttingDown
from protos.expert_pb2_grpc import ExpertServicer, add_ExpertServicer_to_server
from protos.ids import PeerId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PEER = PeerId("b")


class Mute(ExpertServicer):
    """Takes streams, and says nothing: not even that it has begun to read."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self._leaving = threading.Event()
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool)
        add_ExpertServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Compute(self, requests: object, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        context.add_callback(self._leaving.set)
        self.asked.release()
        assert self._leaving.wait(WAIT_S)
        return iter(())

    def stop(self) -> None:
        self._leaving.set()
        self._server.stop(None).wait()
        self._pool.shutdown()


@pytest.fixture
def mute() -> Iterator[Mute]:
    made = Mute()
    yield made
    made.stop()


@pytest.fixture
def streams(mute: Mute) -> Iterator[ExpertStreams]:
    links = ToyLinks({PEER: mute})  # type: ignore[dict-item]
    made = ExpertStreams(links)  # type: ignore[arg-type]
    made.connect(PEER, "", time.monotonic())
    assert mute.asked.acquire(timeout=WAIT_S)
    yield made
    made.close(WAIT_S)
    links.close()


def running() -> int:
    return sum(thread.name.startswith("shoal-duplex") for thread in threading.enumerate())


def test_a_stream_to_a_peer_that_says_nothing_ends_when_it_is_closed(streams: ExpertStreams) -> None:
    streams.close(WAIT_S / 4)
    assert running() == 0
    ended = streams.wait(WAIT_S)
    assert isinstance(ended, Ended) and isinstance(ended.error, ShuttingDown)


@pytest.mark.parametrize(
    "end",
    [
        lambda streams: streams.drop(PEER),
        lambda streams: streams.fault(PEER, InvalidRequest("it answered what was not asked")),
    ],
    ids=["dropped", "at fault"],
)
def test_a_stream_to_a_peer_that_says_nothing_ends_when_it_is(
    streams: ExpertStreams, end: Callable[[ExpertStreams], None]
) -> None:
    assert not streams.is_free(PEER, time.monotonic())
    end(streams)
    assert isinstance(streams.wait(WAIT_S / 4), Ended)


@pytest.mark.parametrize("kind", ["experts", "steps"])
def test_streams_that_do_not_end_are_waited_for_together(kind: str) -> None:
    links: Any = Links()
    links.open.clear()
    links.reachable = False
    peers = [PeerId(f"peer {n}") for n in range(20)]
    streams: Any
    if kind == "experts":
        streams = ExpertStreams(links)
        for peer in peers:
            streams.connect(peer, "", 0.0)
    else:
        streams = PeerStreams(links, lambda _: None, lambda *_: None, lambda *_: None, queue_max=1)  # type: ignore
        for peer in peers:
            streams.to(peer, "")
    began = time.monotonic()
    streams.close(0.2)
    took_s = time.monotonic() - began
    links.open.set()
    streams.close(WAIT_S)
    assert took_s < 0.2 * len(peers) / 2
    assert running() == 0


def test_the_peers_that_are_asked_for_experts_have_a_limit(
    streams: ExpertStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_streams, "STREAMS_MAX", 3)
    now = time.monotonic()
    others = [PeerId(f"peer {n}") for n in range(3)]
    for peer in others[:2]:
        streams.connect(peer, "", now)  # ends at once: nobody knows where these are
    with pytest.raises(Overloaded, match="3 peers"):
        streams.connect(others[2], "", now)
    streams.drop(PEER)
    while PEER in streams.peers():
        assert isinstance(streams.wait(WAIT_S), Ended)
    streams.connect(others[2], "", now)


def test_a_peer_that_cannot_be_reached_is_tried_again_later_each_time_up_to_a_limit(streams: ExpertStreams) -> None:
    lane = streams._lanes[PEER]
    waits = []
    for _ in range(20):
        began = time.monotonic()
        streams._over(lane, Overloaded("full"))
        waits.append(lane.retry_at - began)
    assert waits[0] == pytest.approx(expert_streams.RETRY_S, abs=0.05)
    assert waits[-5:] == pytest.approx([expert_streams.RETRY_S_MAX] * 5, abs=0.05)
