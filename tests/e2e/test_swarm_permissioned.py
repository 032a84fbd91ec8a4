"""A permissioned network from its making to a revocation, with the real commands.  PROTOCOL.md, section 16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import pytest
from swarm import Swarm, says, until

from node import status
from node.identity import Identity

if TYPE_CHECKING:
    from pathlib import Path

    from oracle import Oracle, Oracles
    from swarm import Hatchery, Node

pytestmark = pytest.mark.e2e

SPREAD_S = 20.0
ENDED_S = 30.0


@dataclass
class Operator:
    """Whoever made the network, at a terminal of their own."""

    folder: Path
    hatchery: Hatchery

    def says(self, *command: str) -> str:
        """What `shoal` prints for it."""
        return says(self.hatchery, self.folder, *command)

    @property
    def key(self) -> Path:
        return self.folder / "data" / "shoal" / "networks" / "default.key"


class Permissioned(Swarm):
    """Three nodes that are started when they are told to; the first one runs beside the operator's key."""

    def __init__(self, hatchery: Hatchery, folder: Path, oracle: Oracle) -> None:
        (folder / "operator").mkdir()
        self.operator = Operator(folder / "operator", hatchery)
        self.id = self.operator.says("network", "create")
        super().__init__(hatchery, folder, oracle.store, [["experts:0/0"]] * 3, naughty=(), joins=[[], [0], [0]])
        for node in self.nodes:
            Identity.create().save(node.folder / "node.key")
            node.peer = Identity.load(node.folder / "node.key").peer
            node.arguments += ["--network", str(self.operator.key) if node.number == 0 else self.id]

    def __enter__(self) -> Self:
        return self

    def grant(self, node: Node) -> None:
        """For its next start."""
        path = node.folder / "node.grant"
        granted = self.operator.says("network", "grant", node.peer, "--out", str(path))
        assert granted == str(path)
        if "--grant" not in node.arguments:
            node.arguments += ["--grant", granted]

    def start(self, *numbers: int) -> None:
        for number in numbers:
            self[number].start()
            self[number].wait_ready()

    def known(self, number: int) -> set[str]:
        return {peer.peer_id for peer in self.peers(number).peers}


@pytest.fixture
def three(hatchery: Hatchery, oracle_of: Oracles, tmp_path: Path) -> Permissioned:
    return Permissioned(hatchery, tmp_path, oracle_of("mixtral"))


def test_who_is_granted_takes_part_and_who_is_not_or_no_longer_does_not(three: Permissioned) -> None:
    with three:
        first, second, third = three.nodes
        three.grant(first)
        three.grant(second)
        third.start()
        assert exit_code(third) == status.EXIT_REMOTE
        assert f"give its operator the peer id {third.peer}" in third.errors
        stolen = (second.folder / "node.grant").read_bytes()
        (third.folder / "node.grant").write_bytes(stolen)
        third.arguments += ["--grant", str(third.folder / "node.grant")]
        third.start()
        assert exit_code(third) == status.EXIT_REMOTE
        assert "is the grant of" in third.errors

        three.grant(third)
        three.start(0, 1, 2)
        three.settle()
        everybody = {node.peer for node in three.nodes}
        assert three.peers(1).network == three.id

        three.operator.says("network", "revoke", third.peer)
        for number in (0, 1):
            until(lambda number=number: three.known(number) == everybody - {third.peer}, SPREAD_S, lambda: first.errors)  # type: ignore[misc]
        until(lambda: len(told(third)) == 1, SPREAD_S, lambda: third.errors)

        # What was taken back stays taken back where a node restarts, and its operator's machine is off.
        first.end()
        second.end()
        third.kill()
        (third.folder / "node.revocations").unlink(missing_ok=True)  # as if it had been away
        second.arguments[second.arguments.index("--join") + 1] = third.address
        again(three, second)
        again(three, third)
        until(lambda: len(told(third)) == 2, SPREAD_S, lambda: third.errors)
        assert three.known(1) == {second.peer}

        # A later grant holds again.
        three.grant(third)
        third.end()
        again(three, third)
        until(lambda: three.known(1) == {second.peer, third.peer}, SPREAD_S, lambda: third.errors)


def exit_code(node: Node) -> int:
    """Of a node that does not stay."""
    return node.hatchery.ended(node.pid).result(ENDED_S)


def again(swarm: Permissioned, node: Node) -> None:
    """The same node, once more."""
    swarm._forget(node)
    swarm.start(node.number)


def told(node: Node) -> list[dict[str, object]]:
    """That it learned of its own revocation: once in each run."""
    return node.logged("others refuse what this node says")
