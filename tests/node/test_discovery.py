"""Discovery, its driver: dials, looks names up, tells people, remembers.  A mock clock; dials are functions."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import structlog
import structlog.testing
import trio
import trio.testing

from node import discovery, remembered, seeds
from node.discovery import KNOWN_S, Discovery, Ways
from node.identity import peer_id
from node.remembered import Remembered
from protos.errors import PeerLost, WrongPeer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from pathlib import Path

    from protos.ids import PeerId

NETWORK = bytes(32)
ME, ANNA, BERT = (peer_id(bytes([n]) * 32) for n in range(3))
WAIT_S = 20.0


class World:
    """Who answers where, and whom this node knows."""

    def __init__(self) -> None:
        self.nodes: dict[str, PeerId] = {}
        self.known: dict[PeerId, str] = {}
        self.dials: list[str] = []
        self.dialled = trio.Event()
        self.error: Exception = PeerLost("nobody answers")

    async def dial(self, address: str) -> PeerId:
        self.dials.append(address)
        self.dialled.set()
        await trio.lowlevel.checkpoint()
        peer = self.nodes.get(address.partition("#")[0])
        if peer is None:
            raise self.error
        self.known[peer] = address.partition("#")[0]
        return peer

    async def until(self, condition: Callable[[], bool]) -> None:
        """What other tasks and threads do can only be asked for again."""
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.005)


@asynccontextmanager
async def looking(
    world: World, dial: Callable[[str], Awaitable[Any]] | None = None, **ways: Any
) -> AsyncIterator[Discovery]:
    made = Discovery(Ways(ME, NETWORK, **ways), dial or world.dial, lambda: world.known)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(made.run)
            yield made
            nursery.cancel_scope.cancel()


def run(main: Callable[[], Awaitable[None]]) -> list[Any]:
    with structlog.testing.capture_logs() as said:
        trio.run(main)
    return said


def test_a_seed_is_joined_and_joined_again_when_it_is_gone() -> None:
    async def main() -> None:
        world = World()
        world.nodes["10.0.0.1:1"] = ANNA
        async with looking(world, seeds=["10.0.0.1:1", "junk"]) as made:
            await world.until(lambda: [each.state for each in made.status()] == ["known"])
            assert world.dials == ["10.0.0.1:1"]
            world.known.clear()
            made.wake()
            await world.until(lambda: len(world.dials) == 2)

    assert [each["event"] for each in run(main)] == ["a seed is no address of a node"]


def test_who_is_known_is_looked_at_once_a_second_however_much_is_found_and_at_once_where_somebody_was_reached() -> None:
    async def main() -> None:
        world = World()
        looks = 0

        def known() -> dict[PeerId, str]:
            nonlocal looks
            looks += 1
            return world.known

        made = Discovery(Ways(ME, NETWORK, seeds=[f"10.0.0.{n}:1" for n in range(1, 50)]), world.dial, known)
        async with trio.open_nursery() as nursery:
            began = time.monotonic()
            await nursery.start(made.run)
            await world.until(lambda: len(world.dials) == 49)
            await world.until(lambda: all(each.why for each in made.status()))
            assert looks <= 1 + (time.monotonic() - began) / KNOWN_S
            world.nodes["10.0.0.1:1"] = ANNA
            await world.until(lambda: ANNA in world.known)
            await world.until(lambda: ANNA in made._last)
            nursery.cancel_scope.cancel()

    run(main)


def test_a_seed_that_fails_is_told_once_with_its_reason() -> None:
    async def main() -> None:
        world = World()
        async with looking(world, seeds=["10.0.0.1:1"]) as made:
            await world.until(lambda: len(world.dials) == 2)
            assert made.status()[0].why == "peer_lost: nobody answers"

    said = run(main)
    assert [(each["event"], each["address"], each["error"]) for each in said] == [
        ("cannot join", "10.0.0.1:1", "peer_lost: nobody answers")
    ]


@pytest.mark.parametrize("error", [WrongPeer("another peer"), ValueError("a bug")])
def test_what_does_not_pass_by_itself_is_tried_rarely(error: Exception) -> None:
    async def main() -> None:
        world = World()
        world.error = error
        async with looking(world, seeds=["10.0.0.1:1"]) as made:
            await world.until(lambda: bool(made.status()[0].why))
            retry_s = made.status()[0].retry_s
            assert retry_s is not None
            assert retry_s > 5

    assert run(main)


def test_a_dial_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "DIAL_S_MAX", 0.02)

    async def hang(_: str) -> PeerId:
        await trio.sleep_forever()
        return ANNA

    async def main() -> None:
        world = World()
        async with looking(world, hang, seeds=["10.0.0.1:1"]) as made:
            await world.until(lambda: bool(made.status()[0].why))
            assert "nobody answered within" in made.status()[0].why

    run(main)


def test_a_name_is_looked_up_and_every_address_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [PeerLost("no DNS"), ["10.0.0.1:1", "10.0.0.2:1"]]

    async def resolve(seed: str) -> list[str]:
        await trio.lowlevel.checkpoint()
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(seeds, "resolve", resolve)

    async def main() -> None:
        world = World()
        world.nodes = {"10.0.0.1:1": ANNA, "10.0.0.2:1": BERT}
        async with looking(world, seeds=["shoal.example:1"]):
            await world.until(lambda: set(world.known) == {ANNA, BERT})

    assert [each["error"] for each in run(main)] == ["peer_lost: no DNS"]


def test_peers_of_the_last_run_are_tried_and_those_of_this_one_written_down(tmp_path: Path) -> None:
    path = tmp_path / "node.peers"
    old = Remembered(ANNA, "10.0.0.1:1", int(time.time()) - 100)
    remembered.save(path, NETWORK, [old, Remembered(ME, "10.0.0.9:1", old.seen_at)], time.time())

    async def main() -> None:
        world = World()
        world.known = {BERT: "10.0.0.2:1"}
        async with looking(world, peers_file=path):
            await world.until(lambda: bool(world.dials))
            assert world.dials == [f"10.0.0.1:1#{ANNA}"]

    run(main)
    written = [each.peer for each in remembered.load(path, NETWORK, time.time())]
    assert written == [BERT, *sorted([ME, ANNA])]  # the two were seen last at one time


def test_peers_are_written_down_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "REMEMBER_S", 0.01)
    path = tmp_path / "node.peers"

    async def main() -> None:
        world = World()
        world.known = {BERT: "10.0.0.2:1"}
        async with looking(world, peers_file=path):
            await world.until(path.exists)

    run(main)


def test_who_is_known_by_hearsay_alone_is_not_written_down(tmp_path: Path) -> None:
    path = tmp_path / "node.peers"

    async def main() -> None:
        known = {ANNA: "10.0.0.1:1", BERT: "10.0.0.2:1"}
        made = Discovery(Ways(ME, NETWORK, peers_file=path), World().dial, lambda: known, lambda: {BERT: known[BERT]})
        async with trio.open_nursery() as nursery:
            await nursery.start(made.run)
            nursery.cancel_scope.cancel()

    run(main)
    assert [each.peer for each in remembered.load(path, NETWORK, time.time())] == [BERT]


def test_a_broken_file_and_a_disk_that_fails_are_warnings(tmp_path: Path) -> None:
    path = tmp_path / "node.peers"
    path.write_text("junk")
    path.chmod(0o600)

    async def main() -> None:
        world = World()
        world.nodes["10.0.0.1:1"] = ANNA
        async with looking(world, peers_file=path, seeds=["10.0.0.1:1"]):
            await world.until(lambda: ANNA in world.known)
            await world.until(lambda: len(world.dials) == 1)
            path.unlink()
            path.mkdir()

    assert [each["event"] for each in run(main)] == ["peers of the last run are forgotten", "peers are not remembered"]


def test_who_is_alone_says_so_and_what_to_do() -> None:
    async def main() -> None:
        made = Discovery(Ways(ME, NETWORK), World().dial, dict)
        made._do(discovery.Alone(10.0, 3), trio.lowlevel.current_root_task(), None)  # type: ignore[arg-type]

    (said,) = run(main)
    assert (said["for_s"], said["addresses"]) == (10, 3)
    assert "--lan on" in said["lan"]
    assert "--join" in said["advice"]
