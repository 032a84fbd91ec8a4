"""Several real nodes, TLS between them, answer with transformers' tokens, whoever holds what and whoever is asked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
from oracle import LAYERS
from swarm import Swarm, ask, spans, spans_with_experts_elsewhere, spread

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from oracle import Oracle, Oracles
    from swarm import Hatchery

    from protos import inference_pb2 as pb

pytestmark = pytest.mark.e2e

NEW = 48
LENGTHS = (7, 60, 150)

# Four layers; doors are nodes that hold the `text` unit, which all of these do.
TOPOLOGIES = {
    "experts over four": spread(4),
    "experts over four, twice": spread(4, 2),
    "two spans": spans(LAYERS, 2),
    "four spans": spans(LAYERS, 4),
    "spans with experts elsewhere": spans_with_experts_elsewhere(LAYERS, 2, 2),
}
FAST = {
    "mixtral": ["experts over four, twice", "two spans"],
    "deepseek_v3": ["four spans"],
    "gpt_oss": ["spans with experts elsewhere"],
}
SLOW = {
    "mixtral": ["experts over four", "four spans", "spans with experts elsewhere"],
    "deepseek_v3": ["experts over four", "experts over four, twice", "two spans", "spans with experts elsewhere"],
    "gpt_oss": ["experts over four", "experts over four, twice", "two spans", "four spans"],
    "qwen3_moe": list(TOPOLOGIES),
}
CASES = [pytest.param((family, name), id=f"{family}, {name}") for family, names in FAST.items() for name in names]
CASES += [
    pytest.param((family, name), id=f"{family}, {name}", marks=pytest.mark.slow)
    for family, names in SLOW.items()
    for name in names
]


@dataclass
class Running:
    """A topology that runs, and what it should say."""

    name: str
    swarm: Swarm
    oracle: Oracle

    @property
    def prompts(self) -> list[list[int]]:
        return [self.oracle.prompt(length) for length in LENGTHS]


@pytest.fixture(scope="module", params=CASES)
def running(
    request: pytest.FixtureRequest, hatchery: Hatchery, oracle_of: Oracles, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    family, name = request.param
    oracle = oracle_of(family)
    with Swarm(hatchery, tmp_path_factory.mktemp("swarm"), oracle.store, TOPOLOGIES[name]) as swarm:
        yield Running(name, swarm, oracle)
        assert [node.end() for node in swarm.nodes] == [0] * len(swarm.nodes)
        assert [node.number for node in swarm.nodes if "Traceback" in node.errors] == []


def test_one_door_gives_the_tokens_of_transformers(running: Running) -> None:
    before = works(running.swarm)
    for prompt in running.prompts:
        answer = ask(running.swarm.client(0), prompt, NEW)
        assert running.oracle.excuses(prompt, answer.tokens)
        assert [notice for notice in answer.notices if not notice.late] == []  # a busy machine is late, and no fault
    _assert_everybody_worked(running, before, works(running.swarm))


def test_three_doors_at_once_give_the_tokens_of_transformers(running: Running) -> None:
    """Three prompts at each of three doors; with two nodes, one of them is asked twice."""
    swarm = running.swarm
    doors = [n % len(swarm.nodes) for n in range(3)]
    jobs = [(door, prompt) for door in doors for prompt in running.prompts]
    with ThreadPoolExecutor(len(jobs)) as pool:
        answers = list(pool.map(lambda job: ask(swarm.client(job[0]), job[1], NEW), jobs))
    wrong = [
        job for job, answer in zip(jobs, answers, strict=True) if not running.oracle.excuses(job[1], answer.tokens)
    ]
    assert wrong == []


def works(swarm: Swarm) -> list[dict[str, pb.LayerWork]]:
    return [swarm.work(node.number) for node in swarm.nodes]


def _assert_everybody_worked(
    running: Running, before: Sequence[dict[str, pb.LayerWork]], after: Sequence[dict[str, pb.LayerWork]]
) -> None:
    """What should be spread was: every expert holder computed pairs, every holder of a stage computed steps.

    With two replicas a node may have nothing to do, where the others between them hold everything that is asked for.
    """
    swarm = running.swarm

    def gained(kind: str, peer: str) -> int:
        return sum(
            getattr(now[peer], kind) - (getattr(then[peer], kind) if peer in then else 0)
            for then, now in zip(before, after, strict=True)
            if peer in now
        )

    experts = running.oracle.manifest.experts
    for node in swarm.nodes:
        # The work of a layer without experts is not counted: who has only such layers cannot be seen here.
        if "twice" not in running.name and not (running.name == "four spans" and experts[node.number] == 0):
            assert gained("pairs", node.peer) + gained("steps", node.peer) > 0, f"node {node.number} did nothing"
    if "four" in running.name and "experts" in running.name:
        remote = sum(gained("pairs", node.peer) for node in swarm.nodes[1:])
        share = remote / sum(gained("pairs", node.peer) for node in swarm.nodes)
        assert share > (0.3 if "twice" in running.name else 0.6)
