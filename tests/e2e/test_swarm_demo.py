"""The demo model in float32, over four nodes and four spans, and with a node killed: transformers' tokens.

The checkpoint is built in the user's cache if it is not there; where its source cannot be fetched, this is skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import oracle as oracles
import pytest
from deeds import Deed
from swarm import Swarm, ask, spans, spread
from transformers import AutoTokenizer

from node.demo.build import build
from node.demo.source import SourceUnavailable

if TYPE_CHECKING:
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


def test_experts_over_four_nodes_and_one_that_dies(
    demo: Oracle, prompt: list[int], hatchery: Hatchery, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Swarm(hatchery, tmp_path_factory.mktemp("swarm"), demo.store, spread(4, 2)) as swarm:
        assert demo.excuses(prompt, ask(swarm.client(0), prompt, NEW).tokens)
        mine = swarm[0].peer
        work = {peer: total.calls for peer, total in swarm.work(0).items() if peer != mine}
        victim = swarm.by_peer(max(work, key=lambda peer: work[peer]))
        victim.order(Deed("kill", "decode", 100))
        answer = ask(swarm.client(0), prompt, NEW)
        assert len(victim.done) == 1
        assert victim.peer in [notice.peer_id for notice in answer.notices]
        assert demo.excuses(prompt, answer.tokens)


@pytest.mark.parametrize("count", [2, 4])
def test_spans(
    demo: Oracle, prompt: list[int], hatchery: Hatchery, tmp_path_factory: pytest.TempPathFactory, count: int
) -> None:
    holds = spans(demo.manifest.layers, count)
    with Swarm(hatchery, tmp_path_factory.mktemp("swarm"), demo.store, holds) as swarm:
        assert demo.excuses(prompt, ask(swarm.client(0), prompt, NEW).tokens)


def test_experts_over_four_nodes_once(
    demo: Oracle, prompt: list[int], hatchery: Hatchery, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with Swarm(hatchery, tmp_path_factory.mktemp("swarm"), demo.store, spread(4)) as swarm:
        assert demo.excuses(prompt, ask(swarm.client(0), prompt, NEW).tokens)
