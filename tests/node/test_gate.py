"""Waiting for admission, with a mock clock."""

import pytest
import trio
import trio.testing

from coordinator.admission import Admission
from node.gate import Gate
from protos.errors import Overloaded
from protos.ids import SessionId


def test_whoever_waits_enters_when_the_first_has_left() -> None:
    order: list[str] = []

    async def visit(gate: Gate, name: str) -> None:
        async with gate.admitted(SessionId(name)):
            order.append(f"{name} in")
            await trio.sleep(10)
            order.append(f"{name} out")

    async def main() -> None:
        gate = Gate(Admission(1, 2))
        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(visit, gate, name)
                await trio.testing.wait_all_tasks_blocked()
        assert gate.running == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert order == ["a in", "a out", "b in", "b out", "c in", "c out"]


def test_a_full_queue_refuses_and_keeps_nothing() -> None:
    async def main() -> None:
        gate = Gate(Admission(1, 0))
        async with gate.admitted(SessionId("a")):
            with pytest.raises(Overloaded, match="no place"):
                async with gate.admitted(SessionId("b")):
                    raise AssertionError
        async with gate.admitted(SessionId("b")):
            assert gate.running == 1

    trio.run(main)


def test_a_turn_that_does_not_come_in_time_is_refused() -> None:
    async def main() -> None:
        gate = Gate(Admission(1, 1, queue_wait_s_max=30.0))
        async with gate.admitted(SessionId("a")):
            with pytest.raises(Overloaded, match="no turn came within 30 s"):
                async with gate.admitted(SessionId("b")):
                    raise AssertionError
            assert trio.current_time() == 30.0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_client_that_gives_up_while_waiting_leaves_the_queue() -> None:
    async def main() -> None:
        core = Admission(1, 1)
        gate = Gate(core)
        async with gate.admitted(SessionId("a")):
            with trio.move_on_after(1):
                async with gate.admitted(SessionId("b")):
                    raise AssertionError
            assert core.waiting == 0
        assert core.running == 0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
