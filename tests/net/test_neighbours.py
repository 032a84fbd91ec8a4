"""PROTOCOL.md, "Discovery", on a LAN of namespaces:

    [machine 0]   [machine 1]   [machine 2]   [machine 3]
         `-------------`--- switch --'-------------'        10.77.0.0/24, multicast, no way out

On each machine one process, which runs node.lan alone and says what it hears.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import namespaces
import pytest

from node.identity import peer_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from namespaces import Machine

pytestmark = [pytest.mark.namespaces, pytest.mark.timeout(120)]

CODE = Path(__file__).parents[2]
FISH, CRABS = (b"\x01" * 32).hex(), (b"\x02" * 32).hex()
PEERS = [peer_id(bytes([n]) * 32) for n in range(8)]
FIND_S = 15.0
TTL_S = 4


@pytest.fixture(scope="module")
def lan() -> Iterator[namespaces.Lan]:
    try:
        namespaces.require()
    except namespaces.NoNamespaces as error:
        pytest.skip(f"NOT TESTED, a LAN needs network namespaces: {error}")
    with namespaces.Lan(4) as made:
        yield made


class Neighbour:
    """A running process; `heard`: the addresses that it knows now."""

    def __init__(self, machine: Machine, peer: str, port: int = 7645, network: str = FISH) -> None:
        self.address = f"{machine.address}:{port}#{peer}"
        self.heard: set[str] = set()
        self.history: list[dict[str, str]] = []
        self._news = threading.Condition()
        self.process = machine.start(
            [sys.executable, str(Path(__file__).with_name("neighbour.py")), peer, str(port), network, str(TTL_S)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            environment={"PYTHONPATH": str(CODE)},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._end()

    def leave(self) -> None:
        """As it should: with a farewell."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self._end()

    def kill(self) -> None:
        self.process.kill()
        self._end()

    def wait(self, condition: Callable[[set[str]], bool], within_s: float) -> float:
        """Seconds until what is heard is so."""
        began = time.monotonic()
        with self._news:
            met = self._news.wait_for(lambda: condition(self.heard), within_s)
        assert met, f"{self.address} heard {self.history}"
        return time.monotonic() - began

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            with self._news:
                self.history.append(said)
                if "found" in said:
                    self.heard.add(said["found"])
                else:
                    self.heard.discard(said["gone"])
                self._news.notify_all()

    def _end(self) -> None:
        self.process.wait(namespaces.END_S)
        self._reader.join(namespaces.END_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def test_four_find_each_other_within_seconds(lan: namespaces.Lan) -> None:
    neighbours = [Neighbour(machine, PEERS[n]) for n, machine in enumerate(lan.machines)]
    with neighbours[0], neighbours[1], neighbours[2], neighbours[3]:
        everybody = {each.address for each in neighbours}
        for each in neighbours:
            each.wait(lambda heard, each=each: heard == everybody - {each.address}, FIND_S)  # type: ignore[misc]


def test_two_networks_on_one_lan_do_not_see_each_other(lan: namespaces.Lan) -> None:
    with (
        Neighbour(lan[0], PEERS[0], network=FISH) as fish,
        Neighbour(lan[1], PEERS[1], network=CRABS) as crab,
        Neighbour(lan[2], PEERS[2], network=FISH) as other_fish,
        Neighbour(lan[3], PEERS[3], network=CRABS) as other_crab,
    ):
        for one, other in ((fish, other_fish), (crab, other_crab)):
            one.wait(lambda heard, other=other: other.address in heard, FIND_S)  # type: ignore[misc]
            other.wait(lambda heard, one=one: one.address in heard, FIND_S)  # type: ignore[misc]
        # Whoever has heard of its own kind has heard everything that was said before.
        seen = [said["found"] for each in (fish, crab, other_fish, other_crab) for said in each.history]
        assert sorted(seen) == sorted(each.address for each in (fish, crab, other_fish, other_crab))


def test_one_that_moves_to_another_port_is_found_again(lan: namespaces.Lan) -> None:
    with Neighbour(lan[0], PEERS[0]) as watcher:
        with Neighbour(lan[1], PEERS[1], port=7645) as before:
            watcher.wait(lambda heard: heard == {before.address}, FIND_S)
            before.kill()
        with Neighbour(lan[1], PEERS[1], port=7700) as after:
            watcher.wait(lambda heard: heard == {after.address}, FIND_S)


def test_one_that_leaves_is_gone_at_once(lan: namespaces.Lan) -> None:
    with Neighbour(lan[0], PEERS[0]) as watcher, Neighbour(lan[1], PEERS[1]) as leaver:
        watcher.wait(lambda heard: heard == {leaver.address}, FIND_S)
        leaver.leave()
        assert watcher.wait(lambda heard: not heard, FIND_S) < TTL_S


def test_one_that_is_killed_is_gone_after_its_time_and_comes_back_where_it_was(lan: namespaces.Lan) -> None:
    with Neighbour(lan[0], PEERS[0]) as watcher:
        with Neighbour(lan[1], PEERS[1]) as killed:
            watcher.wait(lambda heard: heard == {killed.address}, FIND_S)
            killed.kill()
            watcher.wait(lambda heard: not heard, 3 * TTL_S + FIND_S)
        with Neighbour(lan[1], PEERS[1]) as again:
            watcher.wait(lambda heard: heard == {again.address}, FIND_S)


def test_one_that_stays_is_never_said_to_be_gone(lan: namespaces.Lan) -> None:
    """Longer than an announcement holds: it is asked for again, and answers."""
    with Neighbour(lan[0], PEERS[0]) as watcher, Neighbour(lan[1], PEERS[1]) as stays:
        watcher.wait(lambda heard: heard == {stays.address}, FIND_S)
        with Neighbour(lan[2], PEERS[2]) as clock:
            watcher.wait(lambda heard: clock.address in heard, FIND_S)
            clock.kill()
            watcher.wait(lambda heard: clock.address not in heard, 3 * TTL_S + FIND_S)
        assert {"gone": stays.address} not in watcher.history


def test_two_processes_with_one_key_are_both_found(lan: namespaces.Lan) -> None:
    """The second one's name is changed; a person will be told by whoever meets the two records."""
    with Neighbour(lan[0], PEERS[0]) as watcher, Neighbour(lan[1], PEERS[1]) as one:
        watcher.wait(lambda heard: heard == {one.address}, FIND_S)
        with Neighbour(lan[2], PEERS[1]) as other:
            watcher.wait(lambda heard: heard == {one.address, other.address}, FIND_S)


def test_the_namespaces_end_with_the_block_and_nothing_runs_in_them_any_more(lan: namespaces.Lan) -> None:
    with namespaces.Lan(2) as made:
        left = made[0].start(["sleep", "1000"])
        names = [machine.name for machine in made.machines]
    assert left.wait(namespaces.END_S) != 0
    assert not any((Path("/run/netns") / name).exists() for name in names)


def test_what_a_killed_run_left_behind_is_removed_by_the_next(lan: namespaces.Lan) -> None:
    """A process that has ended, with a number that no other has now."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(namespaces.END_S)
    name = f"shoal-lan-{ended.pid}-0-left"
    subprocess.run(["ip", "netns", "add", name], check=True)
    namespaces.remove_left_behind()
    assert not (Path("/run/netns") / name).exists()


def test_there_is_no_way_out_of_the_lan(lan: namespaces.Lan) -> None:
    assert "default" not in lan[0].run("ip", "route")
    assert lan[0].run("ip", "-o", "link").count("\n") == 2  # lo and eth0
    assert os.getpid() not in lan[0].pids()
