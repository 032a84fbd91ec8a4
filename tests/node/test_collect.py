"""A door that nobody can call: it comes for the results of its stages, and hears of their loss all the same."""

from __future__ import annotations

import contextlib
import queue
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import trio
from test_stage_service import PROMPT, S, Stranger, opening, route
from toy_streams import WAIT_S, Call, Links
from toy_swarm import LAYERS, Swarm, ask, eventually, expected, ids, manifest, notices, record

from node import collect, deliveries, pickup
from node.collect import Collect
from node.mail import Mail
from node.pickup import Pickup, Reader
from node.stage_wire import refusal_message
from node.stages import At
from protos import expert_pb2, peers_pb2, stage_pb2
from protos import stage_pb2 as pb
from protos.epoch import Epoch
from protos.errors import InvalidRequest, Overloaded, PeerLost, UnknownSession
from protos.ids import PeerId, SessionId
from protos.stage_pb2_grpc import StageStub

if TYPE_CHECKING:
    from collections.abc import Iterator

OTHER = SessionId("other")
SPANS = [range(2), range(2, LAYERS)]
STAGE = [At(PeerId("stage"), "stage:1")]


@pytest.fixture
def swarm() -> Iterator[Swarm]:
    with Swarm() as running:
        yield running


@pytest.mark.parametrize("spans", [[range(LAYERS)], SPANS], ids=["one stage", "two stages"])
def test_a_door_that_nobody_can_call_gets_its_answer(swarm: Swarm, spans: list[range]) -> None:
    nodes = [swarm.node(span) for span in spans]
    door = swarm.node(called=False)
    for _ in range(2):
        assert ids(trio.run(partial(ask, door.door, PROMPT, 8))) == expected(PROMPT, 8)
    eventually(lambda: sum(node.sessions for node in nodes) == 0)


def test_a_stage_that_dies_is_replaced_also_for_a_door_that_comes(swarm: Swarm) -> None:
    nodes = [swarm.node(span) for span in SPANS]
    door = swarm.node(called=False)
    spare = swarm.node(SPANS[1], known=False)

    def on_token(count: int) -> None:
        if count == 3:
            swarm.records[spare.peer] = record(spare, SPANS[1])
            nodes[1].kill()

    events = trio.run(partial(ask, door.door, PROMPT, 8, on_token=on_token))
    assert ids(events) == expected(PROMPT, 8)
    assert nodes[1].peer in [notice.peer_id for notice in notices(events)]


def test_a_session_of_a_door_that_never_comes_is_freed(swarm: Swarm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "DOOR_LOST_S", 0.0)
    node = swarm.node(range(LAYERS))
    stranger = Stranger(node)
    request = opening(door=stranger.identity.peer, model_id=manifest().model_id)
    request.route.CopyFrom(route(stranger.identity.peer, ((node.peer, 0, LAYERS - 1),)))
    request.route.door.address = ""
    stranger.link.call(lambda channel: StageStub(channel).Open, request, timeout_s=5.0)
    eventually(lambda: node.sessions == 0)
    stranger.close()


def test_a_stage_whose_result_is_refused_frees_the_session(swarm: Swarm) -> None:
    node, door = swarm.node(range(LAYERS)), swarm.node(called=False)
    request = opening(door=door.peer, model_id=manifest().model_id)
    request.route.CopyFrom(route(door.peer, ((node.peer, 0, LAYERS - 1),)))
    request.route.door.address = ""
    door.links.to(node.peer, node.address).call(lambda channel: StageStub(channel).Open, request, timeout_s=5.0)
    step = pb.Step(session_id=S, epoch=request.epoch, until=3, token_ids=[1, 2, 3], reply=pb.REPLY_TOKEN)
    node.host.take(step, door.peer)
    door.door.collect.enter(OTHER, [At(node.peer, node.address)])
    eventually(lambda: node.sessions == 0)


def test_a_door_that_turns_out_uncallable_in_the_middle_of_an_answer_comes_for_the_rest(swarm: Swarm) -> None:
    nodes = [swarm.node(span) for span in SPANS]
    door = swarm.node()
    spare = swarm.node(SPANS[1], known=False)

    def on_token(count: int) -> None:
        if count == 3:
            door.known.called_at = ""
            swarm.records[spare.peer] = record(spare, SPANS[1])
            nodes[1].kill()
        if count == 6:
            read.extend(node.host._deliveries._pickups[door.peer].is_read for node in (nodes[0], spare))

    read: list[bool] = []
    events = trio.run(partial(ask, door.door, PROMPT, 8, on_token=on_token))
    assert ids(events) == expected(PROMPT, 8)
    assert read == [True, True]


def test_answers_that_follow_each_other_share_one_stream(swarm: Swarm) -> None:
    node, door = swarm.node(range(LAYERS)), swarm.node(called=False)
    streams = set()
    for _ in range(8):
        assert ids(trio.run(partial(ask, door.door, PROMPT, 1))) == expected(PROMPT, 1)
        streams.add(door.door.collect._streams._streams[node.peer][0])
    assert len(streams) == 1


def test_a_stage_that_has_no_room_for_results_is_not_held_to_have_failed(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "_results", lambda _: refused)
    swarm.node(range(LAYERS))
    door = swarm.node(called=False)
    failed: list[Any] = []
    monkeypatch.setattr(door.known, "failed", lambda *what: failed.append(what))
    with contextlib.suppress(Overloaded):  # or it has started by then, and the last event says it
        assert ids(trio.run(partial(ask, door.door, PROMPT, 4))) == []
    assert failed == []


def refused(*_: object, **__: object) -> Any:
    raise Overloaded("no room for streams")


def test_no_stream_outlasts_the_answers_that_need_it_and_nothing_stays(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("node.collect.KEEP_S", 0.0)
    node, door = swarm.node(range(LAYERS)), swarm.node(called=False)
    there = [At(node.peer, node.address)]
    for session in (S, OTHER):
        door.door.collect.enter(session, there)
    eventually(lambda: node.services.streams == 1)
    door.door.collect.leave(S)
    assert door.door.collect._streams.alive(node.peer)
    door.door.collect.leave(OTHER)
    eventually(lambda: node.services.streams == 0)
    eventually(lambda: node.host._deliveries._pickups == {})


def test_a_refused_stream_of_results_is_told_as_what_it_is(swarm: Swarm) -> None:
    node, door = swarm.node(range(LAYERS), streams_max=1), swarm.node(called=False)
    stranger = Stranger(node)
    stranger.stream(stranger.stage.Steps)
    eventually(lambda: node.services.streams == 1)
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    door.door.mail.expect(S, told.put)
    door.door.mail.route(S, Epoch(1, door.peer), {node.peer: 0}, 0, comes=True)
    door.door.collect.enter(S, [At(node.peer, node.address)])
    assert isinstance(told.get(timeout=20.0).error, Overloaded)
    stranger.close()


def test_a_door_that_comes_anew_takes_the_place_of_its_former_stream(swarm: Swarm) -> None:
    node = swarm.node(range(LAYERS))
    stranger = Stranger(node)

    def come() -> Any:
        return stranger.stream(stranger.stage.Results)

    former = come()
    eventually(lambda: len(node.host._deliveries._pickups) == 1)
    later = come()
    assert list(former) == []
    eventually(lambda: node.services.streams == 1)
    later.cancel()
    eventually(lambda: node.services.streams == 0)
    eventually(lambda: node.host._deliveries._pickups == {})
    stranger.close()


def toy(monkeypatch: pytest.MonkeyPatch, call: Any) -> tuple[Mail, Collect]:
    """A door's, whose streams of results are such calls."""
    monkeypatch.setattr(collect, "_results", lambda _: call)
    mail, links = Mail(), Links()
    return mail, Collect(links, manifest(), mail)  # type: ignore[arg-type]


def told(mail: Mail, session: SessionId, *, comes: bool) -> queue.SimpleQueue[Any]:
    """Of such a session at the toy stage."""
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    mail.expect(session, said.put)
    mail.route(session, Epoch(1, PeerId("door")), {STAGE[0].peer: 0}, 0, comes=comes)
    return said


def test_one_way_of_results_that_breaks_is_no_loss_for_the_answers_that_use_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mail, made = toy(monkeypatch, refused)
    delivered, fetched = told(mail, S, comes=False), told(mail, OTHER, comes=True)
    made.enter(OTHER, STAGE)
    assert isinstance(fetched.get(timeout=WAIT_S).error, Overloaded)
    assert delivered.empty()
    mail.joined(STAGE[0].peer)
    mail.left(STAGE[0].peer, lost=True)
    assert isinstance(delivered.get(timeout=WAIT_S).error, PeerLost)
    assert fetched.empty()
    made.close(WAIT_S)


def test_results_under_way_on_a_broken_stream_are_lost_also_where_the_next_answer_has_begun_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mail, made = toy(monkeypatch, Call)
    first, second = told(mail, S, comes=True), told(mail, OTHER, comes=True)
    made.enter(S, STAGE)
    broken = made._used[STAGE[0].peer]
    broken._alive = False  # and its end is about to be told
    made.enter(OTHER, STAGE)
    broken._break(PeerLost("it broke"))
    assert isinstance(first.get(timeout=WAIT_S).error, PeerLost)
    assert second.empty()
    made.close(WAIT_S)


class Laid:
    """A stage's stream of results of a session that no door knows; it reads no refusal before the fifth."""

    refused: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __init__(self, refusals: Iterator[pb.DeliverRefusal], *, metadata: object = None) -> None:
        self._refusals = refusals

    def __iter__(self) -> Iterator[pb.StepResult]:
        for position in range(5):
            yield result(position)
        for _ in range(2):
            self.refused.put(next(self._refusals).position)
        yield result(9)
        for refusal in self._refusals:
            self.refused.put(refusal.position)

    def cancel(self) -> bool:
        return True


def test_refusals_that_wait_for_a_stage_have_a_limit_and_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collect, "REFUSALS_AHEAD_MAX", 2)
    _, made = toy(monkeypatch, Laid)
    made.enter(S, STAGE)
    assert [Laid.refused.get(timeout=WAIT_S) for _ in range(3)] == [0, 1, 9]
    made.close(WAIT_S)


def test_a_refusal_is_short_whatever_was_refused() -> None:
    long = pb.StepResult(session_id="s" * 100_000, epoch=pb.Epoch(counter=1, door="d" * 100_000))
    assert refusal_message(long, UnknownSession("s" * 100_000)).ByteSize() < 4096


def test_who_refuses_results_of_a_session_that_is_not_its_own_is_not_heard(swarm: Swarm) -> None:
    node = swarm.node(range(LAYERS))
    refusal = refusal_message(pb.StepResult(session_id="nobody's"), InvalidRequest("no"))
    with structlog.testing.capture_logs() as said:
        node.host.refused(PeerId("stranger"), refusal)
    assert said == []


def test_every_stream_between_nodes_goes_both_ways_so_that_a_peer_that_is_put_out_is_cut_from_it() -> None:
    """See node.server: streams in both directions are those of nodes."""
    for file in (stage_pb2, expert_pb2, peers_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert method.client_streaming == method.server_streaming, method.full_name


def result(position: int) -> pb.StepResult:
    return pb.StepResult(position=position)


def test_results_that_wait_for_a_door_to_come_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickup, "RESULTS_AHEAD_MAX", 2)
    waiting = Pickup()
    for position in range(2):
        waiting.put(partial(result, position))
    with pytest.raises(Overloaded):
        waiting.put(partial(result, 2))
    reader = Reader()
    waiting.begin(reader)
    reading = waiting.read(reader)
    assert [next(reading).position for _ in range(2)] == [0, 1]


def test_only_the_latest_reader_reads_and_the_end_of_a_former_one_does_not_end_it() -> None:
    waiting, former, latest = Pickup(), Reader(), Reader()
    waiting.begin(former)
    waiting.begin(latest)
    waiting.put(partial(result, 0))
    waiting.end(former)
    assert list(waiting.read(former)) == []
    assert waiting.is_read
    assert next(waiting.read(latest)).position == 0
    waiting.end(latest)
    assert list(waiting.read(latest)) == []
