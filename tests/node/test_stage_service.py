"""The services of stages and doors over real gRPC: limits, who may say what, and whom a door blames."""

from __future__ import annotations

import queue
import time
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trio
from test_stage_host import opening, route
from toy_swarm import LAYERS, Node, Swarm, ask, eventually, expected, ids, manifest, notices, record

from node.identity import Identity
from node.link import Lane, Link, Links
from node.mail import Mail
from node.stage_wire import StageFailed, StageNotice
from node.status import from_rpc
from node.turnstile import STREAMS_OF_A_PEER_MAX
from protos import stage_pb2 as pb
from protos.epoch import Epoch
from protos.errors import Gap, InvalidRequest, Overloaded, PeerLost, PermissionDenied, UnknownSession
from protos.ids import PeerId, SessionId
from protos.stage_pb2_grpc import DoorStub, StageStub
from shard.stage import StepResult

if TYPE_CHECKING:
    from collections.abc import Iterator

PROMPT = [5, 17, 99, 3, 42]
S = SessionId("s")


class Stranger:
    """Somebody with a key of his own, and what he can call at a node."""

    def __init__(self, node: Node) -> None:
        self.identity = Identity.create()
        self.links = Links(self.identity, plaintext=True)
        self.link: Link = self.links.to(node.peer, node.address)
        self.outgoing: list[queue.SimpleQueue[Any]] = []
        self.calls: list[Any] = []

    @property
    def stage(self) -> StageStub:
        return StageStub(self.link.channel(Lane.STEPS))

    def stream(self, method: Any, *items: Any) -> Any:
        """A stream that stays open after the items."""
        out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for item in items:
            out.put(item)
        self.outgoing.append(out)
        call = method(iter(out.get, None), metadata=self.link.metadata())
        self.calls.append(call)  # or gRPC cancels what nobody refers to
        return call

    def close(self) -> None:
        for out in self.outgoing:
            out.put(None)
        self.links.close()


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    with Swarm() as made:
        yield made


def test_one_stream_too_many_is_refused_at_once_and_short_calls_still_run(swarm: Swarm) -> None:
    node = swarm.node(range(LAYERS), streams_max=3)
    stranger = Stranger(node)
    stub, door = stranger.stage, DoorStub(stranger.link.channel(Lane.STEPS))
    for method in (stub.Steps, door.Deliver, stub.Steps):
        stranger.stream(method)
    eventually(lambda: node.services.streams == 3)
    for _ in range(10):
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as refused:
            next(stranger.stream(door.Deliver))
        assert time.monotonic() - began < 5.0
        assert isinstance(from_rpc(refused.value, ""), Overloaded)
    close = pb.CloseRequest(session_id="s", epoch=pb.Epoch(counter=1, door="x"))
    stranger.link.call(lambda channel: StageStub(channel).Close, close, timeout_s=5.0)
    stranger.close()
    eventually(lambda: node.services.streams == 0)


def test_one_caller_does_not_take_the_streams_of_others(swarm: Swarm) -> None:
    node = swarm.node(range(LAYERS))
    greedy, modest = Stranger(node), Stranger(node)
    door = DoorStub(greedy.link.channel(Lane.STEPS))
    for method in (greedy.stage.Steps, door.Deliver):
        for _ in range(STREAMS_OF_A_PEER_MAX):
            greedy.stream(method)
    eventually(lambda: node.services.streams == 2 * STREAMS_OF_A_PEER_MAX)
    for method in (greedy.stage.Steps, door.Deliver):
        with pytest.raises(grpc.RpcError) as refused:
            next(greedy.stream(method))
        assert isinstance(from_rpc(refused.value, ""), Overloaded)
    modest.stream(modest.stage.Steps)
    eventually(lambda: node.services.streams == 2 * STREAMS_OF_A_PEER_MAX + 1)
    for stranger in (greedy, modest):
        stranger.close()


def test_only_the_door_of_a_session_may_touch_it(swarm: Swarm) -> None:
    node = swarm.node(range(LAYERS))
    me, other = Stranger(node), Stranger(node)
    mine = me.identity.peer
    request = opening(door=mine, model_id=manifest().model_id)
    request.route.CopyFrom(route(mine, ((node.peer, 0, LAYERS - 1),)))
    with pytest.raises(PermissionDenied):
        other.link.call(lambda channel: StageStub(channel).Open, request, timeout_s=5.0)
    assert me.link.call(lambda channel: StageStub(channel).Open, request, timeout_s=5.0).held == 0
    close = pb.CloseRequest(session_id=S, epoch=request.epoch)
    with pytest.raises(PermissionDenied):
        other.link.call(lambda channel: StageStub(channel).Close, close, timeout_s=5.0)
    step = pb.Step(session_id=S, epoch=request.epoch, until=3, token_ids=[1, 2, 3], reply=pb.REPLY_TOKEN)
    ack = next(other.stream(other.stage.Steps, step))
    assert (ack.session_id, ack.refused.code) == (S, "permission_denied")
    ack = next(
        me.stream(me.stage.Steps, pb.Step(session_id="none", epoch=request.epoch, until=1, token_ids=[1], reply=1))
    )
    assert ack.refused.code == "unknown_session"
    truncate = pb.TruncateRequest(session_id=S, epoch=request.epoch, position=99)
    with pytest.raises(Gap) as gap:
        me.link.call(lambda channel: StageStub(channel).Truncate, truncate, timeout_s=5.0)
    assert gap.value.held == 0
    me.link.call(lambda channel: StageStub(channel).Close, close, timeout_s=5.0)
    assert node.sessions == 0
    for stranger in (me, other):
        stranger.close()


def test_a_door_refuses_results_of_sessions_that_it_does_not_know(swarm: Swarm) -> None:
    node = swarm.node()
    stranger = Stranger(node)
    result = pb.StepResult(session_id=S, epoch=pb.Epoch(counter=1, door="x"), position=3, answer=pb.Answer(token=1))
    refusal = next(stranger.stream(DoorStub(stranger.link.channel(Lane.STEPS)).Deliver, result))
    assert (refusal.session_id, refusal.error.code) == (S, "unknown_session")
    stranger.close()


def test_a_stage_that_is_told_that_nobody_knows_its_session_frees_it(swarm: Swarm) -> None:
    node, door = swarm.node(range(LAYERS)), swarm.node()
    request = opening(door=door.peer, model_id=manifest().model_id)
    request.route.CopyFrom(route(door.peer, ((node.peer, 0, LAYERS - 1),)))
    request.route.door.address = door.address
    door.links.to(node.peer, node.address).call(lambda channel: StageStub(channel).Open, request, timeout_s=5.0)
    assert node.sessions == 1
    step = pb.Step(session_id=S, epoch=request.epoch, until=3, token_ids=[1, 2, 3], reply=pb.REPLY_TOKEN)
    node.host.take(step, door.peer)
    eventually(lambda: node.sessions == 0)
    assert len(node.host) == 0


def _stuck(node: Node) -> None:
    """From now on its steps are queued and never computed, while everything else goes on."""

    def step(_: object) -> Future[Any]:
        return Future()

    node.worker.step = step  # type: ignore[method-assign, union-attr]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_stage_that_is_stuck_is_found_by_asking_and_avoided(swarm: Swarm, victim: int) -> None:
    spans = [range(2), range(2, LAYERS)]
    nodes = [swarm.node(span) for span in spans]
    door = swarm.node(step_deadline_s=0.5)
    spare = swarm.node(spans[victim], known=False)

    def on_token(count: int) -> None:
        if count == 3:
            swarm.records[spare.peer] = record(spare, spans[victim])
            _stuck(nodes[victim])

    events = trio.run(partial(ask, door.door, PROMPT, 8, on_token=on_token))
    assert ids(events) == expected(PROMPT, 8)
    eventually(lambda: sum(node.sessions for node in swarm.nodes) == 0)


def test_a_lost_answer_is_the_last_stage_s(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    swarm.node(range(2))
    last = swarm.node(range(2, LAYERS))
    door = swarm.node(step_deadline_s=0.5)
    spare = swarm.node(range(2, LAYERS), known=False)
    monkeypatch.setattr(last.host._deliveries, "send", lambda *_: None)
    swarm.records[spare.peer] = record(spare, range(2, LAYERS))
    for _ in range(4):  # the plan takes either of the two at random
        assert ids(trio.run(partial(ask, door.door, PROMPT, 4))) == expected(PROMPT, 4)


def test_a_stage_that_has_lost_the_session_is_opened_anew(swarm: Swarm) -> None:
    first = swarm.node(range(2))
    lost = swarm.node(range(2, LAYERS))
    door = swarm.node()
    spare = swarm.node(range(2, LAYERS), known=False)

    def on_token(count: int) -> None:
        if count == 3:
            swarm.records[spare.peer] = record(spare, range(2, LAYERS))
            lost.kill()
            (session,) = first.host._sessions
            first.host.close(session, Epoch(99, door.peer), door.peer).result()

    events = trio.run(partial(ask, door.door, PROMPT, 8, on_token=on_token))
    assert ids(events) == expected(PROMPT, 8)
    assert notices(events)


def test_mail_takes_a_peer_s_word_for_its_own_stage_and_its_neighbours() -> None:
    mail, got = Mail(), []
    epoch, a, b, c = Epoch(2, PeerId("door")), PeerId("a"), PeerId("b"), PeerId("c")
    mail.expect(S, got.append)
    mail.route(S, epoch, {a: 0, b: 1, c: 2}, 2)
    error = PeerLost("gone")
    for peer, result, refusal in [
        (PeerId("x"), StepResult(S, epoch, 3, token=1), PermissionDenied),
        (a, StepResult(S, epoch, 3, token=1), InvalidRequest),
        (a, StageFailed(S, epoch, 0, error, 2), InvalidRequest),
        (c, StageFailed(S, epoch, 0, error, 3), InvalidRequest),
        (c, StepResult(S, Epoch(3, PeerId("door")), 3, token=1), InvalidRequest),
        (c, StepResult(SessionId("other"), epoch, 3, token=1), UnknownSession),
    ]:
        with pytest.raises(refusal):
            mail.take(peer, result)
    mail.take(c, StepResult(S, Epoch(1, PeerId("door")), 3, token=1))
    mail.take(c, StageNotice(S, epoch, 0, "", "", PeerId("")))
    assert got == []
    mail.take(c, StepResult(S, epoch, 3, token=1))
    mail.take(a, StageFailed(S, epoch, 0, error, 1))
    mail.joined(b)
    mail.joined(b)
    mail.left(b, lost=True)
    mail.left(b, lost=False)  # it had finished with its last one
    assert len(got) == 2
    mail.joined(b)
    mail.left(b, lost=True)
    assert (got[2].stage, got[2].error.code) == (1, "peer_lost")
    mail.forget(S)
    mail.deliver(StepResult(S, epoch, 3, token=1))
    assert len(got) == 3
