"""The demo model in float32, in every topology, and with peers that die, freeze or lie: transformers' tokens.

The checkpoint is built in the user's cache if it is not there; where its source cannot be fetched, this is skipped.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import oracle as oracles
import pytest
from failing import answer_while_a_peer_fails
from swarm import Swarm, ask, spans, spans_with_experts_elsewhere, spread
from transformers import AutoTokenizer

from node.demo.build import build
from node.demo.source import SourceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from deeds import What
    from failing import Moment
    from oracle import Oracle
    from swarm import Hatchery

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

NEW = 24
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    try:
        checkpoint = build()
    except SourceUnavailable as error:
        pytest.skip(f"NOT TESTED, the demo model cannot be built here: {error}")
    return oracles.of_checkpoint(checkpoint, tmp_path_factory.mktemp("demo") / "store")


@pytest.fixture(scope="module")
def prompt(demo: Oracle) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(demo.model.config.name_or_path)
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_dict=False
    )
    return ids


TOPOLOGIES = {
    "experts over four": lambda layers: spread(4),
    "experts over four, twice": lambda layers: spread(4, 2),
    "two spans": lambda layers: spans(layers, 2),
    "four spans": lambda layers: spans(layers, 4),
    "spans with experts elsewhere": lambda layers: spans_with_experts_elsewhere(layers, 2, 2),
}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_three_doors_give_the_tokens_of_transformers(
    demo: Oracle, prompt: list[int], hatchery: Hatchery, tmp_path: Path, name: str
) -> None:
    holds = TOPOLOGIES[name](demo.manifest.layers)
    with Swarm(hatchery, tmp_path, demo.store, holds) as swarm, ThreadPoolExecutor(3) as pool:
        doors = [swarm.client(n % len(swarm.nodes)) for n in range(3)]
        answers = list(pool.map(lambda door: ask(door, prompt, NEW), doors))
        assert [demo.excuses(prompt, answer.tokens) for answer in answers] == [True] * 3


@pytest.fixture(scope="module")
def four(demo: Oracle, hatchery: Hatchery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    """Two replicas of each expert."""
    with Swarm(hatchery, tmp_path_factory.mktemp("swarm"), demo.store, spread(4, 2)) as swarm:
        yield swarm


@pytest.mark.parametrize("moment", ["prefill", "early", "late"])
@pytest.mark.parametrize("what", ["kill", "freeze", "shape"])
def test_an_expert_peer_that_fails_costs_no_token(
    demo: Oracle, prompt: list[int], four: Swarm, what: What, moment: Moment
) -> None:
    answers = answer_while_a_peer_fails(four, what, moment, lambda: ask(four.client(0), prompt, NEW))
    assert all(demo.excuses(prompt, answer.tokens) for answer in answers)
