"""Real nodes find each other, in whatever order they start and wherever they move, and those of two networks never mix.

PROTOCOL.md, sections 14 to 18; on loopback, with one seed.  Without any: tests/net/test_nodes.py.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any, Self

import pytest
from swarm import Swarm, ask, free_ports, spread, until

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracle, Oracles
    from swarm import Hatchery, Node

pytestmark = pytest.mark.e2e

FIND_S = 30.0
NOTICE_S = 40.0  # until a death is certain: a suspicion lasts longer where the machine is busy
ORDERS = [(1, 2, 3, 0), *(tuple(random.Random(seed).sample(range(4), 4)) for seed in (2, 3))]


class Shoal(Swarm):
    """Nodes that start when they are told to."""

    def __enter__(self) -> Self:
        return self

    def start(self, *numbers: int) -> None:
        for number in numbers:
            self[number].start()
            self[number].wait_ready()

    def state(self, number: int, of: Node) -> str:
        return self.status(number, of).state

    def wait(self, number: int, of: Node, state: str) -> None:
        until(lambda: self.state(number, of) == state, NOTICE_S, lambda: self._unseen(self[number]))

    def known(self, number: int) -> set[str]:
        return {peer.peer_id for peer in self.peers(number).peers}


@pytest.fixture(scope="module")
def oracle(oracle_of: Oracles) -> Oracle:
    return oracle_of("mixtral")


def shoal(
    hatchery: Hatchery, folder: Path, oracle: Oracle, holds: list[list[str]], *options: str, **more: Any
) -> Shoal:
    """All of them are told of node 0, also node 0 itself, as one configuration for all would have it."""
    more.setdefault("joins", [[0]] * len(holds))
    return Shoal(hatchery, folder, oracle.store, holds, *options, naughty=(), **more)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
def test_four_nodes_with_one_seed_find_each_other_in_any_order(
    order: tuple[int, ...], hatchery: Hatchery, tmp_path: Path, oracle: Oracle
) -> None:
    with shoal(hatchery, tmp_path, oracle, spread(4)) as four:
        four.start(*order)
        four.settle()
        prompt = oracle.prompt(20)
        assert ask(four.client(order[-1]), prompt, 6).tokens == oracle.tokens(prompt, 6)


def test_a_node_that_moves_is_found_again_and_so_is_the_seed_itself(
    hatchery: Hatchery, tmp_path: Path, oracle: Oracle
) -> None:
    with shoal(hatchery, tmp_path, oracle, spread(3)) as three:
        three.start(0, 1, 2)
        three.settle()
        others = {}
        for moving in (three[2], three[0]):  # the second one remembers whom it knew; nobody is where it says to join
            others = {node.number: node.pid for node in three.nodes if node is not moving}
            moving.end()
            three.move(moving)
            three.start(moving.number)
            three.settle()
            for number in others:
                assert three.status(number, moving).address == moving.address
            assert others == {number: three[number].pid for number in others}
        prompt = oracle.prompt(20)
        assert ask(three.client(1), prompt, 6).tokens == oracle.tokens(prompt, 6)


def test_who_leaves_has_left_and_who_is_killed_is_dead(hatchery: Hatchery, tmp_path: Path, oracle: Oracle) -> None:
    with shoal(hatchery, tmp_path, oracle, [["experts:0/0"]] * 4) as four:
        four.start(0, 1, 2, 3)
        four.settle()
        four[3].end()
        four.wait(0, four[3], "left")
        four.wait(1, four[3], "left")
        four[2].kill()
        four.wait(0, four[2], "dead")
        four.wait(1, four[2], "dead")
        assert four.state(0, four[3]) == "left"
        four.restart(four[2], four[3])
        for node in four[2], four[3]:
            assert [four.state(number, node) for number in (0, 1)] == ["alive", "alive"]


def test_two_networks_do_not_mix_even_where_each_is_told_to_join_the_other(
    hatchery: Hatchery, tmp_path: Path, oracle: Oracle
) -> None:
    joins = [[2], [0, 3], [0], [2, 1]]
    with shoal(hatchery, tmp_path, oracle, [["experts:0/0"]] * 4, joins=joins) as four:
        for node in four.nodes:
            node.arguments += ["--network", "crabs" if node.number < 2 else "fish"]
        four.start(0, 1, 2, 3)
        for node in four.nodes:
            four.meet(node)
        ours = {
            node.peer: {other.peer for other in four.nodes if other.number // 2 == node.number // 2}
            for node in four.nodes
        }
        for number in range(4):
            until(lambda number=number: four.known(number) == ours[four[number].peer], FIND_S, lambda: four[0].errors)  # type: ignore[misc]
        for number, foreign in enumerate((2, 3, 0, 1)):
            node, at = four[number], four[foreign].address
            until(
                lambda node=node, at=at: "wrong_network" in refused(node).get(at, ""),
                FIND_S,
                lambda node=node: node.errors,
            )  # type: ignore[misc]
        assert all(four.known(number) == ours[four[number].peer] for number in range(4))
        assert not any(node.logged("a call failed") for node in four.nodes)


def refused(node: Node) -> dict[str, str]:
    """By address: why it cannot be joined, as the node's log says."""
    return {line["address"]: line["error"] for line in node.logged("cannot join")}


@pytest.mark.slow
@pytest.mark.parametrize("own", ["trunk:*", "trunk:0-1", "trunk:2-3", "experts:0/0"])
def test_a_node_that_cannot_be_called_says_so_and_serves_its_own_clients(
    hatchery: Hatchery, tmp_path: Path, oracle: Oracle, own: str
) -> None:
    """Whether it is all stages of its answers, the first one, or none."""
    ports = free_ports(4)
    called = [f"127.0.0.1:{port}" for port in ports]
    holds = [["trunk:*", "experts:*/0%2"], ["trunk:2-3", "experts:*/1%2"], [own]]
    with shoal(hatchery, tmp_path, oracle, holds, ports=ports[:3], advertise=[*called[:2], called[3]]) as three:
        three.start(0, 1, 2)
        hidden = three[2]
        for node in three.nodes:
            three.meet(node)
        until(lambda: hidden.logged("other nodes cannot reach this one") != [], FIND_S, lambda: hidden.errors)
        (said,) = hidden.logged("other nodes cannot reach this one")
        assert called[3] in said["error"]
        assert called[3] in three.peers(2).unreached
        for number in (0, 1):
            until(lambda number=number: not three.status(number, hidden).layers, FIND_S, lambda: hidden.errors)  # type: ignore[misc]
            assert three.status(number, hidden).state != "alive"
            until(lambda number=number: three.state(2, three[number]) == "alive", FIND_S, lambda: hidden.errors)  # type: ignore[misc]
        prompt = oracle.prompt(20)
        assert ask(three.client(2), prompt, 6).tokens == oracle.tokens(prompt, 6)
        if own == "trunk:*":
            assert three.work(2)[three[1].peer].calls
        # It hears no acks, and thinks for all that of nobody that he is dead; nor does it make others think so.
        assert [three.state(2, three[number]) for number in (0, 1)] == ["alive", "alive"]
        assert not hidden.logged("a peer is dead")
        assert not three[0].logged("a peer is suspect")
        assert ask(three.client(0), prompt, 6).tokens == oracle.tokens(prompt, 6)
