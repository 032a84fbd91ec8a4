"""A long stream over real gRPC on loopback: what is sent arrives in order, and its end is told once, with a reason."""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from node import duplex
from node.duplex import Duplex
from protos.errors import BrokenInvariant, Overloaded, PeerLost, ShoalError, ShuttingDown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Behaviour = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]

METHOD = "/test/Stream"
WAIT_S = 20


@contextlib.contextmanager
def serving(behaviour: Behaviour) -> Iterator[grpc.Channel]:
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool)
    handler = grpc.stream_stream_rpc_method_handler(behaviour)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", {"Stream": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    server.stop(0).wait()
    pool.shutdown()


class Heard:
    """What a stream's callbacks were told."""

    def __init__(self) -> None:
        self.replies: queue.Queue[bytes] = queue.Queue()
        self.ends: list[ShoalError] = []
        self.ended = threading.Event()

    def end(self, error: ShoalError) -> None:
        self.ends.append(error)
        self.ended.set()

    def why(self) -> ShoalError:
        assert self.ended.wait(WAIT_S)
        (error,) = self.ends
        return error

    def open(self, start: Any, queue_max: int = 8) -> Duplex[bytes, bytes]:
        return Duplex(start, self.replies.put, self.end, queue_max=queue_max, name="toy")


def echo(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests


def test_messages_arrive_in_order_and_a_callable_is_called_in_the_sending_thread() -> None:
    heard, encoded_in = Heard(), []

    def encode() -> bytes:
        encoded_in.append(threading.current_thread())
        return b"two"

    with serving(echo) as channel:
        stream = heard.open(channel.stream_stream(METHOD))
        for item in (b"one", encode, b"three"):
            stream.send(item)
        assert [heard.replies.get(timeout=WAIT_S) for _ in range(3)] == [b"one", b"two", b"three"]
        assert encoded_in[0] not in (threading.current_thread(), stream._thread)
        stream.close()
        assert isinstance(heard.why(), ShuttingDown)


def test_a_stream_that_is_finished_sends_what_is_queued_and_ends_well_for_both_sides() -> None:
    heard, got = Heard(), []
    ended_well = threading.Event()

    def count(requests: Iterator[bytes], _: grpc.ServicerContext) -> Iterator[bytes]:
        got.extend(requests)
        ended_well.set()
        yield b"all"

    with serving(count) as channel:
        stream = heard.open(channel.stream_stream(METHOD))
        for item in (b"one", b"two"):
            stream.send(item)
        stream.finish()
        stream.finish()
        with pytest.raises(PeerLost):
            stream.send(b"three")
        assert ended_well.wait(WAIT_S)
        assert heard.replies.get(timeout=WAIT_S) == b"all"
        assert isinstance(heard.why(), ShuttingDown)
    assert got == [b"one", b"two"]


def test_close_may_be_repeated_ends_it_once_and_leaves_no_thread() -> None:
    heard = Heard()
    with serving(echo) as channel:
        stream = heard.open(channel.stream_stream(METHOD))
        stream.send(b"x")
        heard.replies.get(timeout=WAIT_S)
        stream.close()
        stream.close()
        assert stream.join(WAIT_S)
        assert not stream.alive
        with pytest.raises(PeerLost):
            stream.send(b"late")
    assert len(heard.ends) == 1


def test_a_stream_that_the_other_side_ends_is_a_lost_peer() -> None:
    heard = Heard()
    with serving(lambda requests, _: iter([next(requests)])) as channel:
        stream = heard.open(channel.stream_stream(METHOD))
        stream.send(b"x")
        assert isinstance(heard.why(), PeerLost)
        assert heard.replies.get_nowait() == b"x"
        assert not stream.alive


def test_where_nobody_listens_the_peer_is_lost() -> None:
    heard = Heard()
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        heard.open(channel.stream_stream(METHOD))
        assert isinstance(heard.why(), PeerLost)


def test_what_start_raises_ends_the_stream_with_that_reason() -> None:
    heard = Heard()

    def start(_: Iterator[bytes]) -> Any:
        raise Overloaded("no Hello now")

    heard.open(start)
    assert isinstance(heard.why(), Overloaded)


def test_a_full_queue_refuses_and_never_blocks() -> None:
    heard, go = Heard(), threading.Event()

    def start(requests: Iterator[bytes]) -> Any:
        assert go.wait(WAIT_S)
        raise PeerLost("gone")

    stream = heard.open(start, queue_max=2)
    stream.send(b"1")
    stream.send(b"2")
    with pytest.raises(Overloaded):
        stream.send(b"3")
    go.set()
    assert isinstance(heard.why(), PeerLost)


def test_a_stream_closed_while_it_starts_is_cancelled() -> None:
    heard, starting, go = Heard(), threading.Event(), threading.Event()
    with serving(echo) as channel:

        def start(requests: Iterator[bytes]) -> Any:
            starting.set()
            assert go.wait(WAIT_S)
            return channel.stream_stream(METHOD)(requests)

        stream = heard.open(start)
        assert starting.wait(WAIT_S)
        stream.close()
        go.set()
        assert isinstance(heard.why(), ShuttingDown)


def test_our_own_bug_in_encoding_or_in_the_callback_ends_the_stream_and_is_told() -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError

    with serving(echo) as channel:
        encoding = Heard()
        encoding.open(channel.stream_stream(METHOD)).send(broken)
        assert isinstance(encoding.why(), BrokenInvariant)
        receiving = Heard()
        receiving.replies.put = broken  # type: ignore[method-assign]
        receiving.open(channel.stream_stream(METHOD)).send(b"x")
        assert isinstance(receiving.why(), BrokenInvariant)


def test_a_stream_whose_reason_cannot_be_told_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Any:
        raise ZeroDivisionError

    heard = Heard()
    monkeypatch.setattr(duplex, "from_rpc", broken)
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stream = heard.open(channel.stream_stream(METHOD))
        assert isinstance(heard.why(), BrokenInvariant)
    assert not stream.alive
