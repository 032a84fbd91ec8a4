"""Results to doors: of those that wait for one that does not read, some are lost, and nobody waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toy_streams import WAIT_S, Call, Links

from node import deliveries
from node.deliveries import Deliveries
from protos.ids import PeerId
from protos.stage_pb2 import StepResult

if TYPE_CHECKING:
    import pytest

DOOR = PeerId("door")


def test_results_that_wait_for_a_door_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deliveries, "RESULTS_AHEAD_MAX", 3)
    monkeypatch.setattr(deliveries, "_deliver", lambda _: Call)
    links: Any = Links()
    links.open.clear()
    made = Deliveries(links, lambda *_: None, lambda: 0.0)
    made.enter(DOOR, "door:1")
    for position in range(5):
        made.send(DOOR, "door:1", lambda position=position: StepResult(position=position))
    links.open.set()
    assert [Call.taken.get(timeout=WAIT_S).position for _ in range(3)] == [0, 1, 2]
    made.send(DOOR, "door:1", lambda: StepResult(position=9))
    assert Call.taken.get(timeout=WAIT_S).position == 9
    made.close(WAIT_S)
