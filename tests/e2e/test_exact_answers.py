"""What a client gets over gRPC from a packed checkpoint is what transformers says to the same checkpoint on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import tiny
import torch
from test_processes import Node, shoal
from transformers import AutoModelForCausalLM

from node.client import Client
from protos import inference_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NEW = 64
LENGTHS = (7, 20, 45)

FAMILIES = ["deepseek_v3", "phimoe", "mixtral", "gpt_oss"]

# Fast suite: swarms are compared with transformers in test_swarm_answers.
pytestmark = [pytest.mark.e2e, pytest.mark.slow]


class Served:
    """A family's tiny checkpoint: packed, served by a process, and loaded by transformers."""

    def __init__(self, family: str, home: Path) -> None:

        checkpoint = tiny.save(family, home / "checkpoint")
        packed = shoal(home, "pack", str(checkpoint), str(home / "store"))
        assert packed.returncode == 0, packed.stderr
        self.oracle: Any = AutoModelForCausalLM.from_pretrained(checkpoint, experts_implementation="grouped_mm")
        self.node = Node(home, home / "store", "--threads", "1")
        generator = torch.Generator().manual_seed(3)
        self.prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in LENGTHS]

    def reference(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.oracle.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens


@pytest.fixture(scope="module", params=FAMILIES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = Served(request.param, tmp_path_factory.mktemp(request.param))
    yield running
    assert running.node.end() == 0


def test_three_answers_at_once_are_those_of_transformers(served: Served) -> None:
    """The second prompt of PhiMoE crosses the original RoPE length while it decodes, and the third begins beyond it."""
    with Client(served.node.address) as client:
        streams = [client.generate(request(prompt)) for prompt in served.prompts]
        tokens: list[list[int]] = [[] for _ in streams]
        for _ in range(NEW + 1):
            for stream, found in zip(streams, tokens, strict=True):
                event = next(stream)
                found += [event.token.id] if event.HasField("token") else []
        assert [next(stream).finished.generated for stream in streams] == [NEW] * len(streams)
    assert tokens == [served.reference(prompt) for prompt in served.prompts]


def request(prompt: list[int]) -> pb.GenerateRequest:
    sampling = pb.Sampling(max_tokens=NEW, temperature=0.0)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling, ignore_eos=True)
