"""Whole nodes on one LAN that nobody told of each other.  PROTOCOL.md, sections 14 to 18.

    [node 0]   [node 1]   [node 2]   [node 3]
        `----------`- switch -'----------'        10.77.0.0/24, multicast, no way out

Each is a real `shoal run`, forked by the end-to-end tests' hatchery into its machine; what it knows, and what it
answers, a real `shoal` on the same machine asks.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import namespaces
import oracle
import pytest
import swarm
from swarm import QUICK, Hatchery, Node, spread, until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from namespaces import Machine
    from oracle import Oracle

pytestmark = [pytest.mark.namespaces, pytest.mark.timeout(300)]

FIND_S = 45.0
PORT = 7645


@pytest.fixture(scope="module")
def lan() -> Iterator[namespaces.Lan]:
    try:
        namespaces.require()
    except namespaces.NoNamespaces as error:
        pytest.skip(f"NOT TESTED, a LAN needs network namespaces: {error}")
    with namespaces.Lan(4) as made:
        yield made


@pytest.fixture(scope="module")
def hatchery() -> Iterator[Hatchery]:
    with Hatchery() as running:
        yield running


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return oracle.of_family("mixtral", tmp_path_factory.mktemp("mixtral"))


@dataclass
class Housed:
    """A node, and the machine that it runs on."""

    machine: Machine
    node: Node

    def start(self) -> None:
        self.node.start()
        self.node.wait_ready()
        self.node.peer = self.node.peer or str(self.peers()["peer"])

    def says(self, *command: str) -> Any:
        folder = self.node.folder / "client"
        folder.mkdir(exist_ok=True)
        asked = (*command, "--node", self.node.address, "--json")
        return json.loads(swarm.says(self.node.hatchery, folder, *asked, namespace=self.machine.name))

    def peers(self) -> dict[str, Any]:
        found: dict[str, Any] = self.says("peers")
        return found

    def alive(self) -> dict[str, str]:
        """Other peers, and where."""
        return {peer["peer"]: peer["address"] for peer in self.peers()["peers"] if peer["state"] == "alive"}

    def tokens(self, prompt: Sequence[int], new: int) -> list[int]:
        ids = ",".join(map(str, prompt))
        more = ("--max-tokens", str(new), "--ignore-eos", "--temperature", "0", "--repetition-penalty", "1")
        found: list[int] = self.says("generate", "--token-ids", ids, *more)["token_ids"]
        return found


class Shoal:
    """One node on each machine; none has an address to join.  They end with the block."""

    def __init__(
        self, lan: namespaces.Lan, hatchery: Hatchery, folder: Path, store: Path, holds: Sequence[Sequence[str]]
    ) -> None:
        self.housed = []
        environment = {f"SHOAL_{name.upper()}": str(value) for name, value in QUICK.items()}
        for number, hold in enumerate(holds):
            machine, place = lan[number], folder / f"node-{number}"
            place.mkdir()
            address = f"{machine.address}:{PORT}"
            arguments = ["run", "--store", str(store), "--host", machine.address, "--port", str(PORT)]
            arguments += ["--clients", "any", "--threads", "1", "--identity", str(place / "node.key")]
            arguments += ["--log-format", "json", *(word for part in hold for word in ("--hold", part))]
            node = Node(number, place, arguments, address, False, hatchery, environment, machine.name)
            self.housed.append(Housed(machine, node))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.housed:
            if each.node.pid:
                each.node.kill()

    def __getitem__(self, number: int) -> Housed:
        return self.housed[number]

    def settle(self, *groups: Sequence[int]) -> None:
        """Waits until the nodes of each group see each other alive, where they are, and nobody else."""
        for group in groups:
            where = {self[number].node.peer: self[number].node.address for number in group}
            for number in group:
                each, peer = self[number], self[number].node.peer
                others = {other: address for other, address in where.items() if other != peer}
                until(
                    lambda each=each, others=others: each.alive() == others, FIND_S, lambda each=each: each.node.errors
                )  # type: ignore[misc]


def test_four_nodes_find_each_other_and_answer_together(
    lan: namespaces.Lan, hatchery: Hatchery, mixtral: Oracle, tmp_path: Path
) -> None:
    with Shoal(lan, hatchery, tmp_path, mixtral.store, spread(4)) as shoal:
        for each in shoal.housed:
            each.start()
        shoal.settle(range(4))
        prompt = mixtral.prompt(20)
        assert shoal[2].tokens(prompt, 6) == mixtral.tokens(prompt, 6)
        assert {contact["source"] for each in shoal.housed for contact in each.peers()["contacts"]} == {"lan"}


def test_a_node_that_moves_to_another_port_is_found_again(
    lan: namespaces.Lan, hatchery: Hatchery, mixtral: Oracle, tmp_path: Path
) -> None:
    with Shoal(lan, hatchery, tmp_path, mixtral.store, [["experts:0/0"]] * 3) as shoal:
        for each in shoal.housed:
            each.start()
        shoal.settle(range(3))
        moving = shoal[2].node
        moving.kill()
        (moving.folder / "node.peers").unlink(missing_ok=True)  # so that only the LAN can tell it
        moving.arguments[moving.arguments.index("--port") + 1] = str(PORT + 1)
        moving.address = f"{shoal[2].machine.address}:{PORT + 1}"
        pids = [each.node.pid for each in shoal.housed[:2]]
        shoal[2].start()
        shoal.settle(range(3))
        assert pids == [each.node.pid for each in shoal.housed[:2]]


def test_two_networks_on_one_lan_do_not_mix(
    lan: namespaces.Lan, hatchery: Hatchery, mixtral: Oracle, tmp_path: Path
) -> None:
    with Shoal(lan, hatchery, tmp_path, mixtral.store, [["experts:0/0"]] * 4) as shoal:
        for each in shoal.housed:
            each.node.arguments += ["--network", "crabs" if each.node.number < 2 else "fish"]
            each.start()
        shoal.settle((0, 1), (2, 3))
        for each in shoal.housed:
            assert len(each.peers()["peers"]) == 2
            assert len(each.peers()["contacts"]) == 1


def test_a_node_whose_port_is_closed_for_datagrams_names_it_and_is_relied_on_by_nobody(
    lan: namespaces.Lan, hatchery: Hatchery, mixtral: Oracle, tmp_path: Path
) -> None:
    if shutil.which("iptables") is None:
        pytest.skip("NOT TESTED, there is no `iptables` here to close a port with")
    holds = [["trunk:*", "experts:*/0%2"], ["experts:*/1%2"], ["span:*"]]
    closed = f"-p udp --dport {PORT} -j DROP".split()
    with Shoal(lan, hatchery, tmp_path, mixtral.store, holds) as shoal:
        machine, hidden = shoal[2].machine, shoal[2].node
        machine.run("iptables", "-A", "INPUT", *closed)
        try:
            for each in shoal.housed:
                each.start()
            until(lambda: hidden.logged("other nodes cannot reach this one") != [], FIND_S, lambda: hidden.errors)
            (said,) = hidden.logged("other nodes cannot reach this one")
            assert f"is UDP port {PORT} open" in said["error"]
            until(lambda: [len(shoal[n].alive()) for n in range(3)] == [1, 1, 2], FIND_S, lambda: hidden.errors)
            prompt = mixtral.prompt(20)
            assert shoal[2].tokens(prompt, 6) == mixtral.tokens(prompt, 6)
            assert shoal[0].tokens(prompt, 6) == mixtral.tokens(prompt, 6)
        finally:
            machine.run("iptables", "-D", "INPUT", *closed)
