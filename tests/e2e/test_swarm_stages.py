"""A stage that dies: another holder takes its layers and no token is lost; without one, the error names the peer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from oracle import LAYERS
from swarm import Swarm, ask, spans

from protos.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from oracle import Oracles
    from swarm import Hatchery, Node

pytestmark = pytest.mark.e2e

NEW = 60
PROMPT = 40
DOOR = 0
REPAIR_WAIT_S, STEP_DEADLINE_S = 2.0, 20.0
SETTINGS: dict[str, object] = {"repair_wait_s": REPAIR_WAIT_S, "step_deadline_s": STEP_DEADLINE_S}


@pytest.fixture
def shoal(hatchery: Hatchery, oracle_of: Oracles, tmp_path: Path) -> Iterator[Swarm]:
    """The door has the first half of the layers; two nodes have the second half."""
    first, second = spans(LAYERS, 2)
    with Swarm(hatchery, tmp_path, oracle_of("mixtral").store, [first, second, second], settings=SETTINGS) as swarm:
        yield swarm


@pytest.fixture(params=["kill", pytest.param("freeze", marks=pytest.mark.slow)])
def fell(request: pytest.FixtureRequest) -> Callable[[Node], None]:
    return {"kill": lambda node: node.kill(), "freeze": lambda node: node.freeze()}[request.param]


def steps(swarm: Swarm, node: Node) -> int:
    """Of trunk layers, that the node computed."""
    if node.has_ended:
        return 0
    work = swarm.work(node.number)
    return work[node.peer].steps if node.peer in work else 0


class Feller:
    """Fells the stage in use when the answer is so long."""

    def __init__(self, swarm: Swarm, fell: Callable[[Node], None], at: int) -> None:
        self.before = {node.number: steps(swarm, node) for node in swarm.nodes[1:]}
        self.swarm = swarm
        self.fell = fell
        self.at = at
        self.victim: Node | None = None
        self.when = 0.0

    def __call__(self, tokens: int) -> None:
        if tokens == self.at:
            gained = {n: steps(self.swarm, self.swarm[n]) - before for n, before in self.before.items()}
            assert sorted(gained.values())[:-1] == [0] * (len(gained) - 1), "one of them computes this answer"
            self.victim = self.swarm[max(gained, key=lambda n: gained[n])]
            self.when = time.perf_counter()
            self.fell(self.victim)


@pytest.mark.parametrize("at", [1, 20])
def test_another_holder_goes_on_where_a_stage_died(
    shoal: Swarm, oracle_of: Oracles, fell: Callable[[Node], None], at: int
) -> None:
    oracle = oracle_of("mixtral")
    prompt = oracle.prompt(PROMPT)
    feller = Feller(shoal, fell, at)
    answer = ask(shoal.client(DOOR), prompt, NEW, feller)
    assert feller.victim is not None
    assert feller.victim.peer in [notice.peer_id for notice in answer.notices]
    assert oracle.excuses(prompt, answer.tokens)
    gap = max(b - a for a, b in zip(answer.times, answer.times[1:], strict=False))
    print(f"the answer stood still for {gap:.2f} s")


def test_without_another_holder_the_error_names_the_peer(
    hatchery: Hatchery, oracle_of: Oracles, tmp_path: Path, fell: Callable[[Node], None]
) -> None:
    oracle = oracle_of("mixtral")
    with Swarm(hatchery, tmp_path, oracle.store, spans(LAYERS, 2), settings=SETTINGS) as swarm:
        feller = Feller(swarm, fell, 10)
        with pytest.raises(Unavailable) as told:
            ask(swarm.client(DOOR), oracle.prompt(PROMPT), 400, feller)
        assert feller.victim is swarm[1]
        assert swarm[1].peer[:8] in told.value.message
        print(f"{told.value.code} after {time.perf_counter() - feller.when:.2f} s: {told.value.message}")
        assert time.perf_counter() - feller.when < REPAIR_WAIT_S + STEP_DEADLINE_S + 5.0
        info = swarm.client(DOOR).info()
        assert (info.sessions_running, info.kv_bytes_used) == (0, 0)
