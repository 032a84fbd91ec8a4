"""Devices by name: a stage on an accelerator answers as transformers does on the same device.

The same test runs on the CPU, so that what it asks is known to be right where no accelerator is.
"""

from typing import Any

import pytest
import torch
from chain import Chain
from tiny import model

from shard.selfcheck import rope_boundary

NEW = 24
MARGIN = 1e-3  # an accelerator's kernels sum in other orders than each other
LOGITS_TOLERANCE = 1e-3

CUDA = pytest.param(
    "cuda:0",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="NO GPU HERE: the CUDA path was not tested"),
    ],
)
MPS = pytest.param(
    "mps",
    marks=pytest.mark.skipif(not torch.backends.mps.is_available(), reason="NO MPS HERE: that path was not tested"),
)


def reference(tiny: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """transformers' greedy tokens, and the logits [NEW, V] that they came from."""
    output = tiny.generate(
        torch.tensor([prompt], device=tiny.device),
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long, device=tiny.device),
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences[0, len(prompt) :].tolist(), torch.cat(output.logits)


@pytest.mark.parametrize("device", ["cpu", CUDA, MPS])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "phimoe"])
def test_packed_sessions_answer_on_a_device_as_transformers_does_there(family: str, device: str) -> None:
    tiny = model(family).to(device)
    tiny.set_experts_implementation("grouped_mm")
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, 128, (length,), generator=generator).tolist() for length in (7, 20, 45)]
    chain = Chain(tiny, cuts=(1,), rows_max=16, recompute_at=rope_boundary(tiny.config))
    sessions = [chain.open(str(number), prompt, NEW) for number, prompt in enumerate(prompts)]
    for _ in range(NEW):
        chain.feed(*sessions)
    for session, prompt in zip(sessions, prompts, strict=True):
        answer, (tokens, logits) = chain.answers[session], reference(tiny, prompt)
        for position, (ours, theirs) in enumerate(zip(answer.tokens, tokens, strict=True)):
            assert float((answer.logits[position] - logits[position]).abs().max()) <= LOGITS_TOLERANCE
            if ours != theirs:
                best, second = logits[position].topk(2).values.tolist()
                assert best - second < MARGIN
                break


@pytest.mark.parametrize("device", ["cpu", CUDA, MPS])
def test_kv_lives_on_the_device_and_moves_through_the_cpu(device: str) -> None:
    tiny = model("mixtral").to(device)
    here, there = Chain(tiny), Chain(tiny)
    prompt = list(range(5, 30))
    stays, moves = here.open("stays", prompt, 6), here.open("moves", prompt, 6)
    for _ in range(3):
        here.feed(stays, moves)
    kv = here.stages[0].session_kv(moves)
    assert {slab.device.type for slab in kv.keys.values()} == {torch.device(device).type}
    arrived = there.open("moves", here.answers[moves].log, 3)
    exported = {layer: kv.export(layer, 0, kv.held) for layer in kv.keys}
    there.stages[0].session_kv(arrived).restore(0, {layer: (k.cpu(), v.cpu()) for layer, (k, v) in exported.items()})
    for _ in range(3):
        here.feed(stays)
        there.feed(arrived)
    assert there.answers[arrived].log == here.answers[stays].log
