"""Steps to the next stage: whoever sends more than its stream takes hears of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toy_streams import WAIT_S, Call, Links

from node import onward
from node.onward import Onward, Onwards
from protos.epoch import Epoch
from protos.errors import Overloaded
from protos.ids import PeerId, SessionId
from protos.stage_pb2 import Step

if TYPE_CHECKING:
    import pytest


NEXT, DOOR = PeerId("next"), PeerId("door")
S = SessionId("s")


def test_steps_that_wait_for_a_stage_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onward, "STEPS_AHEAD_MAX", 3)
    monkeypatch.setattr(onward, "_steps", lambda _: Call)
    links: Any = Links()
    links.open.clear()
    onwards, told = Onwards(links), []
    mine = Onward(S, Epoch(1, DOOR), 1, NEXT, "", told.append)
    onwards.open(mine)
    for start in range(5):
        onwards.send(mine, lambda start=start: Step(session_id=S, start=start), start)
    assert [(failed.stage, failed.position, type(failed.error)) for failed in told] == [
        (1, 3, Overloaded),
        (1, 4, Overloaded),
    ]
    links.open.set()
    assert [Call.taken.get(timeout=WAIT_S).start for _ in range(3)] == [0, 1, 2]
    onwards.close(WAIT_S)
    assert Call.taken.empty()
