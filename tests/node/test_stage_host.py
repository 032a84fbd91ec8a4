"""What a host of stages accepts from whom, what it tells whom, and what it frees (PROTOCOL.md, sections 8 and 9)."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
from toy_node import manifest

from node import rows, stage_host
from node.capacity import Capacity
from node.deliveries import DOOR_LOST_S
from node.identity import Identity
from node.link import Links
from node.stage_host import IDLE_S, StageHost
from node.stage_wire import StageFailed, StageNotice, read_result, result_message
from protos import messages
from protos import stage_pb2 as pb
from protos.epoch import Epoch
from protos.errors import (
    ExpertsUnreachable,
    Fenced,
    FrameTooLarge,
    Gap,
    InvalidFrame,
    InvalidRequest,
    NonFinite,
    Overloaded,
    PeerLost,
    PermissionDenied,
    ShoalError,
    UnitMissing,
    UnknownSession,
    WrongModel,
)
from protos.ids import PeerId, SessionId
from protos.sampling import SamplingParams
from shard.batch import Step
from shard.stage import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ME, DOOR, NEXT = PeerId("me"), PeerId("door"), PeerId("next")
NOWHERE = "127.0.0.1:9"
KEY = b"k" * 32
S = SessionId("s")


class Hand:
    """A worker whose futures are resolved by hand."""

    def __init__(self) -> None:
        self.steps: list[tuple[Step, Future[StepResult]]] = []
        self.opening: Future[None] | None = None
        self.closed: list[SessionId] = []
        self.held = 0

    def open(self, request: Any) -> Future[None]:
        return self.opening or _done(None)

    def step(self, step: Step) -> Future[StepResult]:
        self.steps.append((step, Future()))
        return self.steps[-1][1]

    def raise_epoch(self, session: SessionId, expected: Epoch, epoch: Epoch) -> Future[None]:
        return _done(None)

    def truncate(self, session: SessionId, position: int) -> Future[None]:
        return _done(None)

    def close(self, session: SessionId, epoch: Epoch) -> Future[None]:
        self.closed.append(session)
        return _done(None)

    def call(self, run: Callable[[Any], Any]) -> Future[Any]:
        return _done(self.held)

    def end(self, *, token: int | None = 7) -> None:
        """The oldest step ends well."""
        step, future = self.steps.pop(0)
        future.set_result(StepResult(step.session, step.epoch, step.end, token=token))

    def fail(self, error: ShoalError) -> None:
        self.steps.pop(0)[1].set_exception(error)


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class Host:
    """One that holds everything, with a clock of its own; `told` is what its own door hears."""

    def __init__(self, span: range = range(2), worker: Any = "hand", capacity: Capacity | None = None) -> None:
        self.worker = Hand()
        self.now = 0.0
        self.told: list[Any] = []
        self.links = Links(Identity.create(), plaintext=True, timeout_s=0.2)
        me = pb.Peer(peer_id=ME, address="127.0.0.1:1")
        taken = self.worker if worker == "hand" else worker
        self.host = StageHost(me, manifest(), taken, span, self.links, capacity=capacity, now=lambda: self.now)
        self.host.deliver_to(self.told.append)


@pytest.fixture
def host() -> Iterator[Host]:
    made = Host()
    yield made
    made.host.shutdown()
    made.links.close()


def route(door: PeerId = ME, spans: tuple[tuple[PeerId, int, int], ...] = ((ME, 0, 1),)) -> pb.Route:
    stages = [
        pb.RouteStage(peer=pb.Peer(peer_id=peer, address=NOWHERE), first_layer=first, last_layer=last)
        for peer, first, last in spans
    ]
    return pb.Route(stages=stages, door=pb.Peer(peer_id=door, address=NOWHERE))


def opening(session: str = S, door: PeerId = ME, stage: int = 0, **fields: Any) -> pb.OpenRequest:
    given: dict[str, Any] = {
        "session_id": session,
        "epoch": pb.Epoch(counter=1, door=door),
        "model_id": manifest().model_id,
        "sampling": messages.sampling_message(SamplingParams()),
        "prompt_ids": [1, 2, 3],
        "positions": 10,
        "resume_key_sha256": hashlib.sha256(KEY).digest(),
        "route": route(door),
        "stage": stage,
    }
    return pb.OpenRequest(**given | fields)


def raising(counter: int = 2, expected: int = 1, door: PeerId = ME, **fields: Any) -> pb.RaiseEpochRequest:
    given: dict[str, Any] = {
        "session_id": S,
        "expected": pb.Epoch(counter=expected, door=door),
        "epoch": pb.Epoch(counter=counter, door=door),
        "resume_key": KEY,
        "route": route(door),
    }
    return pb.RaiseEpochRequest(**given | fields)


def step(start: int = 0, until: int = 3, stop: int | None = None, counter: int = 1, door: PeerId = ME) -> Step:
    tokens = tuple(range(start, until if stop is None else stop))
    return Step(S, Epoch(counter, door), start, until, tokens)


def feed(host: Host, made: Step, caller: PeerId | None = None) -> None:
    host.host.feed(made, pb.REPLY_TOKEN, caller)


def test_8_1_an_open_that_is_not_for_this_node_is_refused(host: Host) -> None:
    for request, error in [
        (opening(model_id="f" * 64), WrongModel),
        (opening(standby=True), InvalidRequest),
        (opening(route=route(ME, ((NEXT, 0, 1),))), InvalidRequest),
        (opening(route=route(ME, ((ME, 0, 0), (NEXT, 1, 1)))), InvalidRequest),
        (opening(route=route(ME, ((ME, 0, 1), (NEXT, 2, 2)))), InvalidRequest),
        (opening(door=DOOR), PermissionDenied),
        (opening(epoch=pb.Epoch(counter=1, door=DOOR)), PermissionDenied),
    ]:
        with pytest.raises(error):
            host.host.open(request)
    with pytest.raises(PermissionDenied):
        host.host.open(opening(door=DOOR), NEXT)
    assert len(host.host) == 0


def test_8_1_opening_what_is_open_is_refused(host: Host) -> None:
    assert host.host.open(opening()).result() == 0
    with pytest.raises(InvalidRequest, match="open already"):
        host.host.open(opening())


def test_a_host_that_ends_while_it_opens_its_first_session_ends(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(threading.Thread):
        def start(self) -> None:
            starting.set()
            ended.wait(0.2)  # longer than it takes to end, or as long as it waits for this
            super().start()

    starting, ended = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        ending = pool.submit(lambda: (starting.wait(20.0), host.host.shutdown()))
        ending.add_done_callback(lambda _: ended.set())
        monkeypatch.setattr(stage_host.threading, "Thread", Slow)
        host.host.open(opening(door=DOOR, epoch=pb.Epoch(counter=1, door=DOOR), route=route(DOOR)), DOOR).result()
        monkeypatch.undo()
        ending.result()


def test_8_1_an_open_that_the_worker_refuses_leaves_nothing(host: Host) -> None:
    host.worker.opening = Future()
    opened = host.host.open(opening())
    host.worker.opening.set_exception(Overloaded("KV is full"))
    with pytest.raises(Overloaded):
        opened.result()
    assert len(host.host) == 0


def test_8_1_an_open_that_fails_after_its_close_leaves_the_session_that_was_opened_anew(host: Host) -> None:
    host.worker.opening = first = Future()
    host.host.open(opening())
    host.host.close(S, Epoch(1, ME))
    host.worker.opening = second = Future()
    host.host.open(opening())
    first.set_exception(Overloaded("KV is full"))
    second.set_result(None)
    assert len(host.host) == 1
    feed(host, step())


def test_8_1_an_open_that_fails_after_its_epoch_was_raised_leaves_nothing(host: Host) -> None:
    host.worker.opening = Future()
    host.host.open(opening())
    host.host.raise_epoch(raising())
    host.worker.opening.set_exception(Overloaded("KV is full"))
    assert len(host.host) == 0


def test_a_node_without_trunk_computes_no_stage() -> None:
    bare = Host(range(0), None)
    with pytest.raises(UnitMissing):
        bare.host.open(opening())


def test_sessions_have_a_limit(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_host, "SESSIONS_MAX", 3)
    for n in range(3):
        host.host.open(opening(f"s{n}"))
    with pytest.raises(Overloaded):
        host.host.open(opening())


def test_8_2_steps_come_from_the_stage_before_and_in_the_epoch_in_force(host: Host) -> None:
    with pytest.raises(UnknownSession):
        feed(host, step())
    host.host.open(opening())
    with pytest.raises(PermissionDenied):
        feed(host, step(), NEXT)
    with pytest.raises(Fenced):
        feed(host, step(counter=0))
    with pytest.raises(InvalidRequest, match="raise it first"):
        feed(host, step(counter=2))
    assert host.worker.steps == []
    feed(host, step())
    host.worker.end()
    assert [(result.token, result.position) for result in host.told] == [(7, 3)]


def test_9_a_feed_that_fails_is_told_once_and_the_next_feed_is_heard_again(host: Host) -> None:
    host.host.open(opening())
    for start in (0, 2, 4):
        feed(host, step(start, 6, start + 2))
    host.worker.fail(ExpertsUnreachable("nobody has expert 3"))
    host.worker.fail(Gap(held=0))
    host.worker.fail(Gap(held=0))
    assert [(told.error.code, told.stage, told.position) for told in host.told] == [("experts_unreachable", 0, 0)]
    feed(host, step(0, 6))
    host.worker.fail(Gap(held=0))
    feed(host, step(0, 6))
    host.worker.end()
    assert [type(told) for told in host.told] == [StageFailed, StageFailed, StepResult]


def test_8_6_a_raise_needs_the_epoch_in_force_and_the_resume_key(host: Host) -> None:
    with pytest.raises(UnknownSession):
        host.host.raise_epoch(raising())
    host.host.open(opening())
    for request in (raising(3, 2), raising(resume_key=b"x" * 32)):
        with pytest.raises(Fenced):
            host.host.raise_epoch(request)
    with pytest.raises(InvalidRequest):
        host.host.raise_epoch(raising(1, 1))
    host.worker.held = 3
    assert host.host.raise_epoch(raising()).result() == 3


def test_8_6_what_was_under_way_in_a_lower_epoch_is_dropped(host: Host) -> None:
    host.host.open(opening())
    feed(host, step())
    feed(host, step(3, 4))
    host.host.raise_epoch(raising())
    host.worker.end()
    host.worker.fail(Fenced("raised"))
    assert host.told == []
    with pytest.raises(Fenced):
        feed(host, step())
    feed(host, step(counter=2))
    host.worker.end()
    assert [told.epoch.counter for told in host.told] == [2]


def test_8_6_another_door_takes_over_with_the_resume_key(host: Host) -> None:
    host.host.open(opening())
    with pytest.raises(PermissionDenied):
        host.host.raise_epoch(raising(door=DOOR, expected=1), NEXT)
    taken = raising(door=DOOR)
    taken.expected.door = ME
    host.host.raise_epoch(taken, DOOR)
    with pytest.raises(PermissionDenied):
        host.host.close(S, Epoch(9, ME))


def test_8_6_close_takes_effect_if_its_epoch_is_not_below(host: Host) -> None:
    host.host.close(S, Epoch(1, ME)).result()
    assert host.worker.closed == []
    host.host.open(opening())
    host.host.raise_epoch(raising())
    with pytest.raises(Fenced):
        host.host.close(S, Epoch(1, ME))
    host.host.close(S, Epoch(2, ME)).result()
    assert host.worker.closed == [S]
    assert len(host.host) == 0


def test_8_4_truncate_needs_the_epoch_in_force(host: Host) -> None:
    host.host.open(opening())
    request = pb.TruncateRequest(session_id=S, epoch=pb.Epoch(counter=2, door=ME), position=1)
    with pytest.raises(InvalidRequest):
        host.host.truncate(request)
    request.epoch.counter = 1
    assert host.host.truncate(request).result() == 1


def test_9_a_next_stage_that_cannot_be_reached_is_the_door_s_to_know() -> None:
    middle = Host(range(1))
    middle.host.open(opening(route=route(ME, ((ME, 0, 0), (NEXT, 1, 1)))))
    _eventually(lambda: bool(middle.told))
    told = middle.told[0]
    assert (type(told), told.stage) == (StageFailed, 1)
    assert isinstance(told.error, PeerLost)
    middle.host.shutdown()


def test_a_notice_goes_to_the_doors_whose_steps_are_computed(host: Host) -> None:
    for session in (S, SessionId("idle")):
        host.host.open(opening(session))
    feed(host, step())
    for late in (False, True):
        host.host.notice("peer_lost", "a replica is gone", NEXT, late=late)
        told = host.told.pop()
        came = read_result(result_message(told, pb.REPLY_TOKEN), host.host.manifest)
        for each in (told, came):
            assert isinstance(each, StageNotice)
            assert (each.session, each.code, each.peer, each.late) == (S, "peer_lost", NEXT, late)
    assert host.told == []


def test_a_door_that_vanished_frees_its_sessions(host: Host) -> None:
    host.host.open(opening())
    host.host.open(opening("theirs", DOOR), DOOR)
    for host.now in (0.0, DOOR_LOST_S / 2, DOOR_LOST_S - 1):
        _eventually(lambda: not host.host._deliveries._streams.alive(DOOR))
        host.host.sweep()
    assert len(host.host) == 2
    _eventually(lambda: not host.host._deliveries._streams.alive(DOOR))
    host.now = 2 * DOOR_LOST_S
    host.host.sweep()
    assert host.worker.closed == ["theirs"]
    assert len(host.host) == 1


def test_a_door_is_asked_about_a_session_that_gets_no_steps(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[pb.StepResult] = []
    monkeypatch.setattr(host.host._deliveries, "send", lambda peer, address, make: sent.append(make()))
    monkeypatch.setattr(host.host._deliveries, "sweep", list)
    host.host.open(opening("theirs", DOOR), DOOR)
    host.host.sweep()
    assert sent == []
    host.now = IDLE_S
    host.host.sweep()
    assert [(message.session_id, message.notice.code) for message in sent] == [("theirs", "")]
    refusal = pb.DeliverRefusal(session_id="theirs", epoch=sent[0].epoch, error=messages.failed(UnknownSession("gone")))
    host.host.refused(DOOR, refusal)
    assert host.worker.closed == ["theirs"]


def test_rows_that_are_no_rows_are_the_sender_s_doing() -> None:
    last = Host(range(1, 2))
    last.host.open(opening(stage=1, route=route(ME, ((NEXT, 0, 0), (ME, 1, 1)))))
    message = pb.Step(session_id=S, epoch=pb.Epoch(counter=1, door=ME), until=2, token_ids=[1, 2], reply=pb.REPLY_TOKEN)
    for data, code in [
        (b"no frame", "invalid_frame"),
        (rows.encode(torch.zeros(2, 5)), "invalid_frame"),
        (rows.encode(torch.zeros(3, 4)), "invalid_frame"),
        (rows.encode(torch.full((2, 4), float("nan"))), "non_finite"),
    ]:
        message.rows = data
        last.host.take(message, NEXT)
        told = last.told.pop()
        assert (told.stage, told.error.code) == (0, code)
    message.rows = rows.encode(torch.ones(2, 4))
    last.host.take(message, NEXT)
    assert last.worker.steps[0][0].rows is not None
    assert last.told == []
    last.host.shutdown()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_cross_the_wire_to_the_bit(dtype: str) -> None:
    made = torch.randn(5, 4, generator=torch.Generator().manual_seed(1)).to(rows.DTYPES[dtype])
    model = _of(dtype)
    assert torch.equal(rows.decode(rows.encode(made[1:4]), model, 3), made[1:4])
    with pytest.raises(InvalidFrame):
        rows.decode(rows.encode(made), model, 4)
    with pytest.raises(NonFinite):
        rows.decode(rows.encode(torch.full((1, 4), float("inf"), dtype=made.dtype)), model, 1)
    assert rows.count_max(model) == 1 << 14


def test_a_frame_above_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(FrameTooLarge):
        rows.decode(bytes((64 << 20) + 1), manifest(), 1)


def test_9_results_cross_the_wire() -> None:
    epoch = Epoch(3, DOOR)
    answer = StepResult(S, epoch, 9, token=5, logprob=-0.5, top=((5, -0.5), (1, -2.0)), prompt_logprobs=(-1.0, -2.5))
    assert read_result(result_message(answer, pb.REPLY_ROWS), manifest()).prompt_logprobs == (-1.0, -2.5)
    top = read_result(result_message(answer, pb.REPLY_TOP), manifest())
    assert (top.token, top.logprob, top.top, top.prompt_logprobs) == (5, -0.5, answer.top, None)
    assert read_result(result_message(answer, pb.REPLY_TOKEN), manifest()).logprob is None
    progress = read_result(result_message(StepResult(S, epoch, 4), pb.REPLY_TOKEN), manifest())
    assert (progress.position, progress.token) == (4, None)
    failed = read_result(result_message(StageFailed(S, epoch, 4, Gap(held=2), 1), pb.REPLY_TOKEN), manifest())
    assert (failed.error.code, failed.error.held, failed.stage, failed.epoch) == ("gap", 2, 1, epoch)


@pytest.mark.parametrize(
    "answer",
    [
        pb.Answer(token=64),
        pb.Answer(token=-1),
        pb.Answer(token=1, top_ids=[1], top_logprobs=[]),
        pb.Answer(token=1, top_ids=[70], top_logprobs=[-1.0]),
        pb.Answer(token=1, logprob=float("nan")),
        pb.Answer(token=1, row_logprobs=[-1.0], rows_start=3),
    ],
)
def test_9_answers_that_make_no_sense_are_refused(answer: pb.Answer) -> None:
    message = pb.StepResult(session_id=S, epoch=pb.Epoch(counter=1, door=DOOR), position=3, answer=answer)
    with pytest.raises(InvalidRequest):
        read_result(message, manifest())
    with pytest.raises(InvalidRequest):
        read_result(pb.StepResult(session_id=S), manifest())


def _of(dtype: str) -> Any:
    from dataclasses import replace

    return replace(manifest(), dtype=dtype)


def _eventually(holds: Callable[[], bool]) -> None:
    import threading

    waiting = threading.Event()
    for _ in range(2000):
        if holds():
            return
        waiting.wait(0.005)
    raise AssertionError("it never came to hold")


def remote(session: str, door: PeerId, positions: int = 10) -> pb.OpenRequest:
    return opening(session, door, positions=positions, route=route(door))


@pytest.fixture
def shared() -> Iterator[Host]:
    made = Host(capacity=Capacity(sessions=100, positions=80))
    yield made
    made.host.shutdown()
    made.links.close()


def test_a_door_leaves_the_last_part_of_a_stage_to_those_that_have_none(shared: Host) -> None:
    """Eight parts of ten positions: seven are for whoever comes, also with what the worker has not opened yet."""
    host, other = shared.host, PeerId("other")
    shared.worker.opening = Future()
    for number in range(7):
        host.open(remote(f"a{number}", DOOR), DOOR)
    with pytest.raises(Overloaded, match="kept for doors"):
        host.open(remote("a7", DOOR), DOOR)
    host.open(remote("b", other), other)
    with pytest.raises(Overloaded):
        host.open(remote("b1", other, 4), other)
    host.open(opening("own"))  # this node's own door has a gate of its own
    host.close(SessionId("a0"), Epoch(1, DOOR), DOOR)
    host.close(SessionId("own"), Epoch(1, ME))
    with pytest.raises(Overloaded):
        host.open(remote("b1", other, 4), other)
    host.close(SessionId("a1"), Epoch(1, DOOR), DOOR)
    host.open(remote("b1", other), other)


def test_a_first_session_may_be_of_any_size_and_sessions_are_shared_too() -> None:
    capacity = Capacity(sessions=4, positions=80)
    capacity.check(DOOR, 80, [])
    capacity.check(DOOR, 80, [(PeerId("other"), 1)])
    capacity.check(DOOR, 1, [(DOOR, 1)] * 2)
    with pytest.raises(Overloaded):
        capacity.check(DOOR, 1, [(DOOR, 1)] * 3)
    capacity.check(DOOR, 1, [(PeerId("other"), 1)] * 3)
