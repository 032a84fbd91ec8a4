"""The service over real gRPC on loopback, with a toy that computes."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

import grpc
import pytest
from toy_node import answer, by_ids, text_files
from toy_server import Node, raw

from node import heartbeat
from node.client import Client
from node.inference_service import EVENTS_AHEAD_MAX
from node.intake import READERS_MAX
from node.server import REFUSAL_THREADS, SPARE_CALLS_MAX
from protos.errors import InvalidRequest, Overloaded, PeerLost, PortInUse, ShuttingDown
from protos.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from collections.abc import Iterator

from protos import inference_pb2 as pb
from protos.limits import INFERENCE_MESSAGE_BYTES_MAX


@pytest.fixture
def node() -> Iterator[Node]:
    with Node() as running:
        yield running


def ids(events: Iterator[pb.GenerateEvent]) -> list[int]:
    return [event.token.id for event in events if event.HasField("token")]


def eventually(holds) -> None:
    """Waits for what another thread does, without a clock of our own deciding how fast it must be."""
    waiting = threading.Event()
    for _ in range(2000):
        if holds():
            return
        waiting.wait(0.005)
    raise AssertionError("it never came to hold")


def test_an_answer_arrives_token_by_token(node: Node) -> None:
    with Client(node.address) as client:
        events = list(client.generate(by_ids(5, 6, max_tokens=4)))
    assert [event.WhichOneof("event") for event in events] == ["started", *["token"] * 4, "finished"]
    assert ids(iter(events)) == answer([5, 6], 4)


def test_info_says_what_is_served_and_how_busy_it_is(node: Node) -> None:
    node.worker.stuck = True
    with Client(node.address) as client:
        events = client.generate(by_ids(5, max_tokens=1))
        next(events)
        info = client.info()
        events.close()
    assert (info.family, info.layers, info.sessions_running, info.kv_bytes_used) == ("toy", 2, 1, 1)
    assert info.model_id == node.door.manifest.model_id
    assert (info.has_tokenizer, info.has_chat_template) == (True, True)


def test_info_says_what_a_model_cannot_take() -> None:
    with Node(text_files(template=False)) as node, Client(node.address) as client:
        assert (client.info().has_tokenizer, client.info().has_chat_template) == (True, False)
    with Node({}) as node, Client(node.address) as client:
        assert (client.info().has_tokenizer, client.info().has_chat_template) == (False, False)


def test_a_request_of_the_largest_size_is_read_and_one_byte_more_is_refused(node: Node) -> None:
    message = by_ids(5)
    message.model = "x" * (INFERENCE_MESSAGE_BYTES_MAX - message.ByteSize() - 5)
    assert message.ByteSize() == INFERENCE_MESSAGE_BYTES_MAX
    with Client(node.address) as client:
        with pytest.raises(InvalidRequest, match="model has a length of"):
            list(client.generate(message))
        message.model += "x"
        with pytest.raises(InvalidRequest, match=f"{INFERENCE_MESSAGE_BYTES_MAX + 1} bytes; at most"):
            list(client.generate(message))
        channel, metadata = raw(client)
        call = InferenceStub(channel).Generate(message, metadata=metadata)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert ("shoal-code", "frame_too_large") in call.trailing_metadata()
        assert ids(client.generate(by_ids(5, max_tokens=2))) == answer([5], 2)


def test_a_refusal_that_repeats_a_long_foreign_text_arrives(node: Node) -> None:
    node.worker.open_fault = InvalidRequest("🙂" * 5000)
    with Client(node.address) as client, pytest.raises(InvalidRequest, match="🙂🙂🙂"):
        list(client.generate(by_ids(5)))


def test_a_refusal_is_a_status_with_its_code(node: Node) -> None:
    with Client(node.address) as client, pytest.raises(InvalidRequest, match="vocabulary"):
        list(client.generate(by_ids(9999)))
    with Client(node.address) as client:
        channel, metadata = raw(client)
        call = InferenceStub(channel).Generate(by_ids(9999), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert ("shoal-code", "invalid_request") in call.trailing_metadata()


def test_a_bug_in_a_call_is_told_and_the_node_goes_on(node: Node) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    healthy, node.worker.step = node.worker.step, broken  # type: ignore[assignment, method-assign]
    with Client(node.address) as client:
        with pytest.raises(Exception, match="ZeroDivisionError"):
            list(client.generate(by_ids(5, max_tokens=1)))
        node.worker.step = healthy  # type: ignore[method-assign]
        assert ids(client.generate(by_ids(5, max_tokens=2))) == answer([5], 2)
    assert node.worker.open_sessions == {}


def test_a_client_that_cancels_frees_its_session(node: Node) -> None:
    node.worker.stuck = True
    with Client(node.address) as client:
        events = client.generate(by_ids(5, max_tokens=1))
        next(events)
        assert node.door.gate.running == 1
        events.close()
        eventually(lambda: node.door.gate.running == 0)
    assert node.worker.open_sessions == {}


def test_too_many_answers_are_refused_with_a_retry_after_while_info_still_answers() -> None:
    with Node(sessions_max=2, queue_max=0) as node, Client(node.address) as client:
        node.worker.stuck = True
        running = [client.generate(by_ids(5, max_tokens=1)) for _ in range(2)]
        for events in running:
            next(events)
        for _ in range(20):
            with pytest.raises(Overloaded, match="no place") as error:
                list(client.generate(by_ids(5, max_tokens=1)))
            assert error.value.retry_after_s == 1.0
        assert client.info().sessions_running == 2
        for events in running:
            events.close()


def test_a_queue_full_of_waiting_answers_does_not_starve_info() -> None:
    with Node(sessions_max=1, queue_max=8) as node, contextlib.ExitStack() as stack:
        node.worker.stuck = True
        client = stack.enter_context(Client(node.address))
        first = client.generate(by_ids(5, max_tokens=1))
        next(first)
        channel, metadata = raw(client)
        waiting = [InferenceStub(channel).Generate(by_ids(5, max_tokens=1), metadata=metadata) for _ in range(8)]
        eventually(lambda: len(node.door._answers) == 9)
        assert client.info().sessions_running == 1
        for call in waiting:
            call.cancel()
        first.close()
        eventually(lambda: node.door.gate.running == 0)


def test_a_node_that_leaves_tells_its_running_answers(node: Node) -> None:
    node.worker.stuck = True
    with Client(node.address) as client:
        events = client.generate(by_ids(5, max_tokens=1))
        next(events)
        node.leave()
        with pytest.raises(ShuttingDown):
            list(events)


def test_nobody_there_is_a_lost_peer(node: Node) -> None:
    with Node() as gone:
        address = gone.address
    with Client(address) as client, pytest.raises(PeerLost, match=address):
        client.info()


def test_a_port_in_use_is_named(node: Node) -> None:
    port = int(node.address.rpartition(":")[2])
    with Node(port=port) as second:
        pass
    (error,) = second.error.exceptions  # type: ignore[union-attr]
    assert isinstance(error, PortInUse)
    assert str(port) in error.message


def test_many_clients_at_once_get_their_own_answers_and_no_thread_stays() -> None:
    before = threading.active_count()
    got: dict[int, list[int]] = {}
    with Node(sessions_max=4, queue_max=64) as node:

        def ask(n: int) -> None:
            with Client(node.address) as client:
                got[n] = ids(client.generate(by_ids(n, max_tokens=5)))

        clients = [threading.Thread(target=ask, args=(n,)) for n in range(1, 21)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(30)
    assert {n for n, tokens in got.items() if tokens == answer([n], len(tokens))} == set(range(1, 21))
    assert node.worker.open_sessions == {}
    eventually(lambda: threading.active_count() <= before + 3)


def test_a_client_that_stops_reading_loses_its_answer_and_holds_no_thread() -> None:
    options = [("grpc.http2.bdp_probe", 0), ("grpc.ssl_target_name_override", "shoal")]  # or it would take in megabytes
    with (
        Node(context=60_000, client_wait_s=0.2) as node,
        Client(node.address) as client,
        contextlib.ExitStack() as stack,
    ):
        _, metadata = raw(client)
        credentials = grpc.ssl_channel_credentials(node.certificate.pem)
        channel = stack.enter_context(grpc.secure_channel(node.address, credentials, options))
        message = by_ids(5, max_tokens=50_000)
        message.ignore_eos = True
        call = InferenceStub(channel).Generate(message, metadata=metadata)
        next(call)
        eventually(lambda: node.door.gate.running == 1)
        eventually(lambda: node.door.gate.running == 0)
        with pytest.raises(grpc.RpcError):
            list(call)
    assert node.worker.open_sessions == {}


def test_more_calls_than_a_server_takes_are_refused_at_once() -> None:
    limits = {"sessions_max": 1, "queue_max": 0, "step_streams_max": 2, "expert_streams_max": 1}
    with Node(**limits) as node, Client(node.address) as client:
        channel, metadata = raw(client)
        node.worker.counting.clear()
        stub = InferenceStub(channel)
        streams = 1 + 2 + 1 + 3 * REFUSAL_THREADS + 3 * READERS_MAX
        count = streams + SPARE_CALLS_MAX + 10
        calls = [stub.Info.future(pb.InfoRequest(), metadata=metadata) for _ in range(count)]
        eventually(lambda: sum(call.done() for call in calls) == 10)
        assert {call.code() for call in calls if call.done()} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        node.worker.counting.set()
        assert sum(call.exception() is None for call in calls) == len(calls) - 10


def test_a_heartbeat_comes_while_there_is_nothing_else_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.05)
    with Node(sessions_max=1) as node, Client(node.address) as client:
        node.worker.stuck = True
        channel, metadata = raw(client)
        first = InferenceStub(channel).Generate(by_ids(5, max_tokens=2), metadata=metadata)
        kinds = [next(first).WhichOneof("event") for _ in range(4)]
        second = InferenceStub(channel).Generate(by_ids(5, max_tokens=2), metadata=metadata)
        assert kinds == ["started", "heartbeat", "heartbeat", "heartbeat"]
        assert [next(second).WhichOneof("event") for _ in range(3)] == ["heartbeat"] * 3  # it waits for a place
        first.cancel()
        second.cancel()


def test_nothing_comes_after_the_end_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.05)
    closing: Future[None] = Future()
    with Node() as node, Client(node.address) as client:
        monkeypatch.setattr(node.worker, "close", lambda *_: closing)  # the stage is busy with another batch
        channel, metadata = raw(client)
        call = InferenceStub(channel).Generate(by_ids(5, max_tokens=2), metadata=metadata)
        while next(call).WhichOneof("event") != "finished":
            pass
        threading.Timer(0.5, closing.set_result, (None,)).start()
        assert list(call) == []


def test_an_answer_is_so_many_events_ahead_of_its_client_at_most(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    count = 2 * EVENTS_AHEAD_MAX

    async def flood(_: object, send) -> None:
        for number in range(count):
            await send(pb.GenerateEvent(token=pb.Token(id=number)))
            sent.append(number)

    class Context:
        def add_callback(self, _: object) -> bool:
            return True

    monkeypatch.setattr(node.door, "generate", flood)
    events = node.inference.Generate(by_ids(5), Context())  # type: ignore[arg-type]
    assert next(events).token.id == 0
    eventually(lambda: len(sent) == EVENTS_AHEAD_MAX + 1)
    threading.Event().wait(0.1)
    assert len(sent) == EVENTS_AHEAD_MAX + 1
    assert [event.token.id for event in events] == list(range(1, count))
