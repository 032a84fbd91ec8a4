"""Long streams to other nodes: how many, and who hears of their end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from toy_streams import WAIT_S, Call, Links

from node import duplex, peer_streams
from node.peer_streams import PeerStreams
from protos.errors import Overloaded, PeerLost, ShoalError, ShuttingDown
from protos.ids import PeerId

if TYPE_CHECKING:
    from collections.abc import Iterator

PEER = PeerId("b")


class Streams:
    def __init__(self, call: type[Call] = Call) -> None:
        self.links = Links()
        self.ends: list[tuple[PeerId, ShoalError]] = []
        self.streams: PeerStreams[Any, Any] = PeerStreams(
            self.links,  # type: ignore[arg-type]
            lambda _: call,  # type: ignore[arg-type, return-value]
            lambda *_: None,
            self._end,
            queue_max=4,
        )

    def _end(self, peer: PeerId, error: ShoalError) -> None:
        self.ends.append((peer, error))


@pytest.fixture
def made() -> Iterator[Streams]:
    streams = Streams()
    yield streams
    streams.streams.close(WAIT_S)


def test_the_end_of_a_stream_that_nobody_needs_is_not_told(made: Streams) -> None:
    stream = made.streams.to(PEER, "")
    made.streams.drop(PEER)
    assert stream.join(WAIT_S)
    assert made.streams.peers() == made.ends == []
    made.streams.to(PEER, "")
    made.streams.close(WAIT_S)
    assert [type(error) for _, error in made.ends] == [ShuttingDown]


def test_nothing_is_kept_of_streams_that_are_over_however_they_ended(made: Streams) -> None:
    for made.links.reachable in (False, True):
        for _ in range(3):
            stream = made.streams.to(PEER, "nowhere")
            if not made.links.reachable:
                assert stream.join(WAIT_S)
            made.streams.drop(PEER)
            assert stream.join(WAIT_S)
    assert [type(error) for _, error in made.ends] == [PeerLost] * 3
    assert made.streams._untold == set()


class Stubborn(Call):
    """It does not end when its requests do."""

    def _take(self) -> None:
        for _ in self._requests:
            pass


def test_a_stream_that_the_other_side_does_not_end_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplex, "FINISH_S", 0.0)
    made = Streams(Stubborn)
    stream = made.streams.to(PEER, "")
    made.streams.drop(PEER)
    assert stream.join(WAIT_S)
    assert made.ends == []
    assert made.streams._finishing == {}


def test_streams_that_the_other_side_does_not_end_count_and_are_over_with_all_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplex, "FINISH_S", 60.0)
    monkeypatch.setattr(peer_streams, "STREAMS_MAX", 2)
    made = Streams(Stubborn)
    streams = []
    for _ in range(2):
        streams.append(made.streams.to(PEER, ""))
        made.streams.drop(PEER)
    with pytest.raises(Overloaded, match="2 streams"):
        made.streams.to(PEER, "")
    made.streams.close(WAIT_S)
    assert not any(stream._thread.is_alive() for stream in streams)


def test_streams_to_other_nodes_have_a_limit_and_those_that_ended_do_not_count(
    made: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_streams, "STREAMS_MAX", 3)
    for n in range(3):
        made.streams.to(PeerId(f"peer {n}"), "")
    with pytest.raises(Overloaded, match="3 streams"):
        made.streams.to(PEER, "")
    made.streams.to(PeerId("peer 1"), "").close()
    made.streams.to(PEER, "")
    with pytest.raises(Overloaded):
        made.streams.to(PeerId("peer 1"), "")
