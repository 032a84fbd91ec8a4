"""A stage that was asked to open is closed once its answer leaves it, however late the open ends (PROTOCOL.md, 8.6)."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from toy_node import ToyWorker, manifest
from toy_streams import WAIT_S
from toy_streams import Links as Nowhere

from coordinator.route import Route, StageRef
from coordinator.session import Opened, OpenStages, SendStep, StepFailed
from node import futures, stages
from node.collect import Collect
from node.identity import Identity
from node.link import Links
from node.mail import Mail
from node.passage import PIECE_ROWS, PIECES_MAX, Passage
from node.stage_host import StageHost
from node.stages import At, Stages
from protos.epoch import Epoch
from protos.errors import Overloaded, PeerLost
from protos.ids import PeerId, SessionId
from protos.sampling import SamplingParams
from protos.stage_pb2 import Peer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ME, OTHER = PeerId("me"), PeerId("other")
NOWHERE = "127.0.0.1:9"
S = SessionId("s")


class Busy(ToyWorker):
    """As a worker in the middle of a batch: what it is told waits, in order, until `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[Future[None]] = []

    def go_on(self) -> None:
        """What follows from what waited is done too."""
        while self._waiting:
            self._waiting.pop(0).set_result(None)

    def open(self, request: Any) -> Future[None]:
        return self._later(partial(super().open, request))

    def raise_epoch(self, session: SessionId, expected: Epoch, epoch: Epoch) -> Future[None]:
        return self._later(partial(super().raise_epoch, session, expected, epoch))

    def close(self, session: SessionId, epoch: Epoch) -> Future[None]:
        return self._later(partial(super().close, session, epoch))

    def _later(self, work: Callable[[], Future[None]]) -> Future[None]:
        turn: Future[None] = Future()
        self._waiting.append(turn)
        return futures.after(turn, lambda _: work())


class Answer:
    """A passage of a door whose own stage is busy.  `span`: what that one computes, of two layers."""

    def __init__(self, span: range = range(2)) -> None:
        self.worker = Busy()
        self.posted: list[Opened | StepFailed] = []
        self.links = Links(Identity.create(), plaintext=True, timeout_s=0.2)
        model = manifest()
        me = At(ME, "127.0.0.1:1")
        self.host = StageHost(Peer(peer_id=ME, address=me.address), model, self.worker, span, self.links)
        self.stages = Stages(self.host, self.links)
        mail = Mail()
        collect = Collect(self.links, model, mail)
        self.passage = Passage(
            S, lambda: me, SamplingParams(), self.host, self.stages, mail, collect, self.posted.append
        )

    def open(self, counter: int, *peers: PeerId) -> None:
        """A route of one stage, which is here, or of these peers'."""
        last = manifest().layers - 1
        stages = [StageRef(peer, n, n, None) for n, peer in enumerate(peers)]
        route = Route(tuple(stages) if len(stages) > 1 else (StageRef(peers[0] if peers else ME, 0, last, None),))
        effect = OpenStages(Epoch(counter, ME), route, 10)
        self.passage.open(effect, {ME: "127.0.0.1:1", OTHER: NOWHERE}, [1, 2, 3], 3)

    def close(self, counter: int) -> list[Future[None]]:
        return self.passage.close(Epoch(counter, ME))

    def shut(self) -> None:
        self.stages.shutdown()
        self.host.shutdown()
        self.links.close()


@pytest.fixture
def answer() -> Iterator[Answer]:
    made = Answer()
    yield made
    made.shut()


def test_8_6_a_stage_here_that_was_still_opening_when_its_answer_ended_is_closed(answer: Answer) -> None:
    answer.open(1)
    (closing,) = answer.close(1)
    answer.worker.go_on()
    closing.result(0)
    assert (len(answer.host), answer.worker.open_sessions) == (0, {})


def test_8_6_a_stage_here_that_was_still_to_be_raised_when_its_answer_ended_is_closed(answer: Answer) -> None:
    answer.open(1)
    answer.open(2)
    (closing,) = answer.close(2)
    answer.worker.go_on()
    closing.result(0)
    assert (len(answer.host), answer.worker.open_sessions) == (0, {})


def test_8_6_a_stage_here_that_a_new_route_leaves_out_while_it_is_raised_is_closed(answer: Answer) -> None:
    answer.open(1)
    answer.open(2)
    answer.open(3, OTHER)
    answer.worker.go_on()
    assert (len(answer.host), answer.worker.open_sessions) == (0, {})


def test_8_6_a_stage_here_that_a_route_leaves_and_comes_back_to_opens_for_that_route_alone(answer: Answer) -> None:
    answer.open(1)
    answer.open(2, OTHER)
    answer.open(3)
    answer.worker.go_on()
    assert [posted.epoch.counter for posted in answer.posted if isinstance(posted, Opened)][-1] == 3
    assert list(answer.worker.open_sessions) == [S]
    (closing,) = answer.close(3)
    answer.worker.go_on()
    closing.result(0)
    assert (len(answer.host), answer.worker.open_sessions) == (0, {})


def test_so_many_pieces_of_a_feed_are_on_their_way_at_once_and_no_more() -> None:
    answer = Answer(range(1))
    answer.worker.stuck = True
    answer.open(1, ME, OTHER)
    answer.worker.go_on()
    until = (PIECES_MAX + 2) * PIECE_ROWS + 5
    answer.passage.feed(SendStep(Epoch(1, ME), 0, tuple(range(until)), until))
    sent = answer.worker.steps
    assert [(made.start, made.end) for made in sent] == [
        (n * PIECE_ROWS, (n + 1) * PIECE_ROWS) for n in range(PIECES_MAX)
    ]
    for computed in range(1, 5):
        answer.passage.progressed(Epoch(1, ME), computed * PIECE_ROWS)
        assert len(sent) == min(PIECES_MAX + computed, PIECES_MAX + 3)
    assert (sent[-1].end, sent[-1].until) == (until, until)
    answer.close(1)
    answer.shut()


def test_calls_to_other_nodes_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CALLS_MAX", 3)
    links: Any = Nowhere()
    links.reachable = False
    links.open.clear()
    answer = Answer()
    calls = Stages(answer.host, links)
    at = At(OTHER, NOWHERE)
    asked = [calls.held(at, S, Epoch(1, ME)) for _ in range(2)]
    asked.append(calls.close(at, S, Epoch(1, ME)))
    with pytest.raises(Overloaded, match="3 calls"):
        calls.held(at, S, Epoch(1, ME)).result(0)
    links.open.set()
    for future in asked[:2]:
        assert isinstance(future.exception(WAIT_S), PeerLost)
    assert isinstance(calls.held(at, S, Epoch(1, ME)).exception(WAIT_S), PeerLost), "there is room again"
    calls.shutdown()
    answer.shut()
