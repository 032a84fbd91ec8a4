"""PROTOCOL.md section 10 from the side that computes, over real gRPC: what a call must be, and how many may come."""

from __future__ import annotations

import contextlib
import queue
import threading
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import torch
from toy_experts import CALLER_KEY, WAIT_S, Holder, Tiny

from node import expert_service
from node import rows as rows_wire
from node.status import from_rpc
from node.turnstile import STREAMS_OF_A_PEER_MAX
from protos import expert_pb2 as pb
from protos import frame, messages, units
from protos.errors import Overloaded
from protos.expert_pb2_grpc import ExpertStub

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny("mixtral")


class Stream:
    """A caller's stream of calls."""

    def __init__(self, channel: grpc.Channel, caller: str) -> None:
        self._out: queue.SimpleQueue[pb.ComputeRequest | None] = queue.SimpleQueue()
        self._call: Any = ExpertStub(channel).Compute(iter(self._out.get, None), metadata=((CALLER_KEY, caller),))

    def begin(self) -> None:
        self._call.initial_metadata()

    def send(self, request: pb.ComputeRequest) -> None:
        self._out.put(request)

    def ask(self, request: pb.ComputeRequest) -> pb.ComputeReply:
        self.send(request)
        return self.reply()

    def reply(self) -> pb.ComputeReply:
        reply: pb.ComputeReply = next(self._call)
        return reply

    def refused(self) -> str:
        reply = self.reply()
        assert reply.WhichOneof("outcome") == "failed"
        return reply.failed.code

    def close(self) -> None:
        self._out.put(None)
        self._call.cancel()


@contextlib.contextmanager
def holder(tiny: Tiny, experts: range = range(4), **limits: Any) -> Iterator[tuple[Holder, Any]]:
    """A holder, and what makes streams to it."""
    served = Holder(tiny, experts, **limits)
    streams: list[Stream] = []
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:

        def stream(caller: str = "") -> Stream:
            streams.append(Stream(channel, caller or f"caller {len(streams)}"))
            return streams[-1]

        yield served, stream
        for made in streams:
            made.close()
    served.stop()


def request(tiny: Tiny, count: int = 2, **changes: Any) -> pb.ComputeRequest:
    hidden, _ = tiny.rows(count)
    fields: dict[str, Any] = {
        "call": 7,
        "model_id": tiny.manifest.model_id,
        "layer": tiny.layer,
        "unit_hashes": [tiny.manifest.unit(units.expert(tiny.layer, expert)).sha256 for expert in (3, 1)],
        "rows": rows_wire.encode(hidden),
        "pair_rows": [0, 1, 0],
        "pair_experts": [1, 0, 0],
    }
    return pb.ComputeRequest(**(fields | changes))


def test_pairs_are_answered_in_the_order_of_the_request(tiny: Tiny) -> None:
    hidden, _ = tiny.rows(2)
    with holder(tiny) as (_, stream), torch.inference_mode():
        reply = stream().ask(request(tiny))
        assert reply.call == 7
        found = rows_wire.decode(reply.rows, tiny.manifest, 3)
        one = tiny.bank(range(4))(tiny.layer, hidden, torch.tensor([[3, 1], [3, 0]]))
        assert torch.equal(found, torch.stack([one[0, 1], one[1, 0], one[0, 0]]))


WRONG = {
    "another model": ({"model_id": "ab" * 32}, "wrong_model"),
    "a layer beyond the last": ({"layer": 99}, "invalid_request"),
    "an unknown unit": ({"unit_hashes": ["ab" * 32, "cd" * 32]}, "unit_missing"),
    "a unit twice": ({"unit_hashes": ["ab" * 32] * 2}, "invalid_request"),
    "no pairs": ({"pair_rows": [], "pair_experts": []}, "invalid_request"),
    "a row beyond the frame": ({"pair_rows": [0, 2, 0]}, "invalid_request"),
    "an expert beyond the units": ({"pair_experts": [0, 2, 0]}, "invalid_request"),
    "no frame": ({"rows": b"rows"}, "invalid_frame"),
    "another width": ({"rows": frame.encode("float32", (2, 3), bytes(24))}, "invalid_frame"),
    "another dtype": ({"rows": frame.encode("bfloat16", (2, 32), bytes(128))}, "invalid_frame"),
    "no rows": ({"rows": frame.encode("float32", (0, 32), b"")}, "invalid_frame"),
    "another rank": ({"rows": frame.encode("float32", (64,), bytes(256))}, "invalid_frame"),
}


def test_a_call_that_is_wrong_is_refused_by_name_and_the_stream_goes_on(tiny: Tiny) -> None:
    with holder(tiny) as (_, make):
        stream = make()
        for name, (changes, code) in WRONG.items():
            reply = stream.ask(request(tiny, **changes))
            assert (reply.call, reply.failed.code) == (7, code), name
        assert stream.ask(request(tiny)).HasField("rows")


def test_a_unit_that_the_model_has_and_this_node_has_not_is_missing(tiny: Tiny) -> None:
    with holder(tiny, range(2)) as (_, make):
        assert make().ask(request(tiny)).failed.code == "unit_missing"


def test_frames_above_the_limit_are_refused_either_way(tiny: Tiny) -> None:
    with holder(tiny, frame_bytes_max=48 + 4 * tiny.hidden * 4) as (_, make):
        stream = make()
        assert stream.ask(request(tiny, count=4)).HasField("rows")
        assert stream.ask(request(tiny, count=5)).failed.code == "frame_too_large"
        many = {"pair_rows": [0, 1] * 3, "pair_experts": [0, 1] * 3}
        assert stream.ask(request(tiny, **many)).failed.code == "frame_too_large"


def test_a_stream_beyond_the_limit_is_refused_at_once_and_one_that_ends_makes_room(tiny: Tiny) -> None:
    with holder(tiny, streams_max=2) as (served, make):
        first, second = make(), make()
        first.begin()
        second.begin()
        with pytest.raises(grpc.RpcError) as refused:
            make().ask(request(tiny))
        error = from_rpc(refused.value, "here")
        assert isinstance(error, Overloaded)
        assert error.retry_after_s
        first.close()
        waiting = threading.Event()
        while served.service.streams > 1:
            waiting.wait(0.005)
        assert make().ask(request(tiny)).HasField("rows")


def test_one_caller_does_not_take_the_streams_of_others(tiny: Tiny) -> None:
    with holder(tiny) as (_, make):
        for _ in range(STREAMS_OF_A_PEER_MAX):
            make("greedy").begin()
        with pytest.raises(grpc.RpcError) as refused:
            make("greedy").ask(request(tiny))
        error = from_rpc(refused.value, "here")
        assert isinstance(error, Overloaded)
        assert "one caller" in error.message
        assert make("modest").ask(request(tiny)).HasField("rows")


class Slow:
    """A bank whose calls wait."""

    def __init__(self, served: Holder) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        bank = served.service._bank
        self._rows, bank.rows = bank.rows, self.rows  # type: ignore[method-assign]

    def rows(self, *arguments: Any) -> torch.Tensor:
        self.begun.release()
        assert self.go.wait(WAIT_S)
        return self._rows(*arguments)


def test_calls_beyond_the_queue_hear_when_to_ask_again(tiny: Tiny) -> None:
    with holder(tiny, queue_max=1) as (served, make):
        slow = Slow(served)
        running, waiting, refused = make(), make(), make()
        running.send(request(tiny))
        assert slow.begun.acquire(timeout=WAIT_S)
        waiting.send(request(tiny))
        pause = threading.Event()
        while not served.service._turns._waiting:
            pause.wait(0.005)
        reply = refused.ask(request(tiny))
        assert isinstance(messages.error(reply.failed), Overloaded)
        assert reply.failed.retry_after_s > 0
        slow.go.set()
        assert running.reply().HasField("rows")
        assert waiting.reply().waited_us > 0


def test_a_call_that_could_not_begin_in_time_is_not_computed(tiny: Tiny) -> None:
    with holder(tiny) as (served, make):
        slow = Slow(served)
        running, late = make(), make()
        running.send(request(tiny))
        assert slow.begun.acquire(timeout=WAIT_S)
        assert late.ask(request(tiny, wait_ms_max=20)).failed.code == "deadline_exceeded"
        slow.go.set()
        assert running.reply().HasField("rows")
        assert not slow.begun.acquire(blocking=False)


def test_no_call_waits_longer_than_the_receiver_lets_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_service, "WAIT_S_MAX", 0.05)
    with holder(tiny) as (served, make):
        slow = Slow(served)
        running, late = make(), make()
        running.send(request(tiny))
        assert slow.begun.acquire(timeout=WAIT_S)
        for wait_ms_max in (0, int(2 * WAIT_S * 1000)):
            assert late.ask(request(tiny, wait_ms_max=wait_ms_max)).failed.code == "deadline_exceeded"
        slow.go.set()
        assert running.reply().HasField("rows")


def test_a_bug_in_one_call_is_told_and_the_stream_goes_on(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tiny) as (served, make):
        bank, stream = served.service._bank, make()
        rows = bank.rows
        bank.rows = lambda *_: 1 / 0  # type: ignore[assignment, method-assign]
        assert stream.ask(request(tiny)).failed.code == "broken_invariant"
        bank.rows = rows  # type: ignore[method-assign]
        assert stream.ask(request(tiny)).HasField("rows")
    assert "ZeroDivisionError" in "".join(capsys.readouterr())
