"""A door that nobody can call: it comes for the results of its stages, and hears of their loss all the same."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from test_stage_service import PROMPT, S, Stranger, opening, route
from toy_swarm import LAYERS, Swarm, ask, eventually, expected, ids, manifest, notices, record

from node import deliveries, pickup
from node.pickup import Pickup, Reader
from node.stages import At
from protos import stage_pb2 as pb
from protos.errors import Overloaded
from protos.stage_pb2_grpc import StageStub

if TYPE_CHECKING:
    from collections.abc import Iterator

SPANS = [range(2), range(2, LAYERS)]


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


def test_a_session_that_its_door_has_forgotten_is_closed(swarm: Swarm) -> None:
    node, door = swarm.node(range(LAYERS)), swarm.node(called=False)
    request = opening(door=door.peer, model_id=manifest().model_id)
    request.route.CopyFrom(route(door.peer, ((node.peer, 0, LAYERS - 1),)))
    request.route.door.address = ""
    door.links.to(node.peer, node.address).call(lambda channel: StageStub(channel).Open, request, timeout_s=5.0)
    step = pb.Step(session_id=S, epoch=request.epoch, until=3, token_ids=[1, 2, 3], reply=pb.REPLY_TOKEN)
    node.host.take(step, door.peer)
    door.door.collect.begin(At(node.peer, node.address))
    eventually(lambda: node.sessions == 0)


def test_a_door_that_comes_anew_takes_the_place_of_its_former_stream(swarm: Swarm) -> None:
    node = swarm.node(range(LAYERS))
    stranger = Stranger(node)
    me = stranger.identity.peer

    def come() -> Any:
        return stranger.stage.Results(pb.ResultsRequest(), metadata=stranger.link.metadata())

    former = come()
    eventually(lambda: me in node.host._deliveries._pickups and node.host._deliveries._pickups[me].is_read)
    later = come()
    assert list(former) == []
    eventually(lambda: node.services.streams == 1)
    later.cancel()
    eventually(lambda: node.services.streams == 0)
    eventually(lambda: node.host._deliveries._pickups == {})
    stranger.close()


def result(position: int) -> pb.StepResult:
    return pb.StepResult(position=position)


def test_results_that_wait_for_a_door_to_come_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickup, "RESULTS_AHEAD_MAX", 2)
    waiting = Pickup()
    for position in range(2):
        waiting.put(partial(result, position))
    with pytest.raises(Overloaded):
        waiting.put(partial(result, 2))
    reading = waiting.read(Reader())
    assert [next(reading).position for _ in range(2)] == [0, 1]


def test_a_reader_that_is_gone_before_it_reads_takes_nothing() -> None:
    waiting, gone = Pickup(), Reader()
    waiting.put(partial(result, 0))
    waiting.end(gone)
    assert list(waiting.read(gone)) == []
    assert not waiting.is_read
    assert next(waiting.read(Reader())).position == 0
