"""A tiny random checkpoint, for tests: it speaks no language, and needs no network.

Law: its bytes depend on the seed alone, and other people's random numbers do not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging

from node.demo.scratch import scratch
from protos.errors import InvalidRequest


def build_random(out: Path, seed: int = 0) -> Path:
    """A tiny random Qwen2-MoE checkpoint in float32 without a tokenizer, for tests only. `out` must not exist yet."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    if out.exists():
        raise InvalidRequest(f"{out} exists already: name a folder that does not, or remove it first")
    config = Qwen2MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, max_position_embeddings=1024, dtype="float32",
        initializer_range=0.2,  # at the usual 0.02 so small a model's logits are nearly ties
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), scratch(out.absolute().parent) as folder:
        torch.manual_seed(seed)
        with _without_bars():
            Qwen2MoeForCausalLM(config).save_pretrained(folder / out.name)
        (folder / out.name).rename(out)
    return out


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws one while it writes, even for a file of a megabyte."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
