"""PROTOCOL.md section 12 over real gRPC: calls that say nothing, and messages that are too long or no messages."""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from toy_node import answer, by_ids
from toy_server import Node, raw

from node.client import Client
from node.hello import OPEN
from node.identity import Identity
from node.intake import READERS_MAX, Intake
from node.link import REPLY_BYTES_MAX, SERVER_OPTIONS, Lane, channel_options, connect
from node.refusal import refusing
from node.server import CONTROL_THREADS
from node.status import CODE_KEY
from protos import peers_pb2
from protos.limits import (
    EXPERT_MESSAGE_BYTES_MAX,
    HELLO_MESSAGE_BYTES_MAX,
    INFERENCE_MESSAGE_BYTES_MAX,
    PEERS_MESSAGE_BYTES_MAX,
    STAGE_MESSAGE_BYTES_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_S = 20.0


class Silence:
    """Calls that never send their message."""

    def __init__(self) -> None:
        self._never: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.calls: list[Any] = []

    def call(self, channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> Any:
        never = iter(self._never.get, None)
        self.calls.append(channel.stream_unary(method).future(never, metadata=metadata, timeout=WAIT_S))
        return self.calls[-1]

    def end(self) -> None:
        for call in self.calls:
            call.cancel()
            self._never.put(None)


@pytest.fixture
def silence() -> Iterator[Silence]:
    made = Silence()
    yield made
    made.end()


@contextlib.contextmanager
def secure(node: Node) -> Iterator[grpc.Channel]:
    with grpc.secure_channel(
        node.address,
        grpc.ssl_channel_credentials(node.certificate.pem),
        options=[("grpc.ssl_target_name_override", "shoal")],
    ) as channel:
        yield channel


@pytest.mark.parametrize("method", sorted(OPEN))
def test_calls_that_say_nothing_keep_no_newcomer_out(silence: Silence, method: str) -> None:
    with Node() as node, secure(node) as channel:
        for _ in range(2 * (CONTROL_THREADS + READERS_MAX)):
            silence.call(channel, method)
        for _ in range(3):
            connect(Identity.create(), node.address, timeout_s=3.0).close()
        silence.end()


def test_calls_that_say_nothing_keep_no_client_out(silence: Silence) -> None:
    with Node(sessions_max=1, queue_max=0) as node, Client(node.address) as client:
        channel, metadata = raw(client)
        for _ in range(64):
            silence.call(channel, "/shoal.v1.Inference/Generate", metadata)
        with Client(node.address) as other:
            events = list(other.generate(by_ids(5, max_tokens=2)))
        assert [event.token.id for event in events if event.HasField("token")] == answer([5], 2)
        silence.end()


class Toys:
    """A server behind an intake alone: methods of real names that answer with what they got."""

    def __init__(self, intake: Intake) -> None:
        self.seen: list[Any] = []
        self._intake = intake
        self._pool = ThreadPoolExecutor(4)
        self._server = grpc.server(self._pool, options=SERVER_OPTIONS, interceptors=[intake])
        self.admit: Callable[[grpc.ServicerContext], None] = lambda _: None
        parse, give = peers_pb2.ChallengeRequest.FromString, peers_pb2.ChallengeRequest.SerializeToString
        methods = {
            "Hello": grpc.unary_unary_rpc_method_handler(_Toy(self), parse, give),
            "One": grpc.unary_unary_rpc_method_handler(_Toy(self), parse, give),
            "Many": grpc.stream_stream_rpc_method_handler(self._echo, parse, give),
        }
        for service in ("Inference", "Stage", "Door", "Expert", "Peers", "Other"):
            handler = grpc.method_handlers_generic_handler(f"shoal.v1.{service}", methods)
            self._server.add_generic_rpc_handlers((handler,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Toys:
        self._intake.start()
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()
        self._intake.close()
        self._pool.shutdown()

    def _echo(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        with refusing(context, "toys"):
            for message in messages:
                self.seen.append(message)
                yield message


class _Toy:
    def __init__(self, toys: Toys) -> None:
        self._toys = toys

    def admit(self, context: grpc.ServicerContext) -> None:
        self._toys.admit(context)

    def __call__(self, message: Any, context: grpc.ServicerContext) -> Any:
        self._toys.seen.append(message)
        return message


def code(call: Callable[[], object]) -> str | grpc.StatusCode:
    """Of the refusal: ours, or gRPC's own."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    sent = dict(error.value.trailing_metadata() or ())  # type: ignore[attr-defined]
    return sent.get(CODE_KEY) or error.value.code()  # type: ignore[attr-defined]


@pytest.fixture
def toys() -> Iterator[Toys]:
    with Toys(Intake()) as made:
        yield made


@pytest.fixture
def channel(toys: Toys) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{toys.port}") as made:
        yield made


def test_a_call_whose_message_does_not_come_is_cancelled(silence: Silence) -> None:
    with Toys(Intake(message_s=0.05)) as toys, grpc.insecure_channel(f"127.0.0.1:{toys.port}") as channel:
        call = silence.call(channel, "/shoal.v1.Peers/One")
        with pytest.raises(grpc.RpcError):
            call.result()
        assert call.code() is grpc.StatusCode.CANCELLED
        assert toys.seen == []
        silence.end()


def test_a_call_that_ends_without_its_message_is_refused(channel: grpc.Channel) -> None:
    assert code(lambda: channel.stream_unary("/shoal.v1.Peers/One")(iter(()), timeout=WAIT_S)) == "invalid_request"


@pytest.mark.parametrize(
    ("method", "bytes_max"),
    [
        ("Inference/One", INFERENCE_MESSAGE_BYTES_MAX),
        ("Stage/Many", STAGE_MESSAGE_BYTES_MAX),
        ("Door/Many", STAGE_MESSAGE_BYTES_MAX),
        ("Expert/Many", EXPERT_MESSAGE_BYTES_MAX),
        ("Peers/One", PEERS_MESSAGE_BYTES_MAX),
        ("Peers/Hello", HELLO_MESSAGE_BYTES_MAX),
        ("Other/One", HELLO_MESSAGE_BYTES_MAX),
    ],
)
def test_the_longest_message_is_parsed_and_one_byte_more_is_not(
    toys: Toys, channel: grpc.Channel, method: str, bytes_max: int
) -> None:
    """Such bytes are no message: what looks at them says so."""

    def call(size: int) -> object:
        path = f"/shoal.v1.{method}"
        if path.endswith("Many"):
            return list(channel.stream_stream(path)(iter([b"\xff" * size]), timeout=WAIT_S))
        return channel.unary_unary(path)(b"\xff" * size, timeout=WAIT_S)

    assert code(lambda: call(bytes_max)) == "invalid_request"
    # The largest limit of all is gRPC's own.
    too_long = grpc.StatusCode.RESOURCE_EXHAUSTED if bytes_max == STAGE_MESSAGE_BYTES_MAX else "frame_too_large"
    assert code(lambda: call(bytes_max + 1)) == too_long
    assert toys.seen == []


def test_what_is_wrong_with_a_message_ends_its_stream_after_those_before_it(channel: grpc.Channel) -> None:
    call = channel.stream_stream("/shoal.v1.Expert/Many")(iter([b"", b"", b"\xff"]), timeout=WAIT_S)
    assert [next(call), next(call)] == [b"", b""]
    assert code(lambda: next(call)) == "invalid_request"


def test_who_may_not_ask_is_refused_before_the_message_is_read(silence: Silence) -> None:
    with Node(clients=["a" * 52]) as node, Client(node.address) as client:
        link = client._linked(WAIT_S)
        generate = silence.call(link.channel(Lane.CLIENTS), "/shoal.v1.Inference/Generate", link.metadata())
        assert code(generate.result) == "permission_denied"
        silence.end()


def test_a_lane_takes_in_replies_of_its_service_and_no_longer_ones() -> None:
    limits = {
        Lane.CONTROL: PEERS_MESSAGE_BYTES_MAX,
        Lane.STEPS: STAGE_MESSAGE_BYTES_MAX,
        Lane.EXPERTS: EXPERT_MESSAGE_BYTES_MAX,
        Lane.BULK: STAGE_MESSAGE_BYTES_MAX,
        Lane.CLIENTS: INFERENCE_MESSAGE_BYTES_MAX,
    }
    assert limits == REPLY_BYTES_MAX
    for lane, limit in limits.items():
        assert dict(channel_options(lane))["grpc.max_receive_message_length"] == limit


def test_the_intake_leaves_no_thread() -> None:
    before = threading.active_count()
    with Toys(Intake()):
        pass
    assert threading.active_count() <= before
