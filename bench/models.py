"""The models that are measured: two that are made on the spot, and the demo model, if the user's cache has it.

Law: every side reads the same checkpoint from disk; nothing is left behind but what was there.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs
import torch
from tokenizers import Tokenizer
from transformers import MixtralConfig, MixtralForCausalLM

from node.demo import build
from shard.pack import pack
from shard.weights import UnitStore

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protos.manifest import Manifest

PROSE = Path(__file__).parents[1] / "protos" / "PROTOCOL.md"


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint, the store it is packed in, and token ids that look like what it is made for."""

    name: str
    checkpoint: Path
    store: Path
    manifest: Manifest
    words: tuple[int, ...]

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Different ones, and the same in every run."""
        assert len(self.words) >= length + count
        stride = (len(self.words) - length) // count
        return [list(self.words[at * stride : at * stride + length]) for at in range(count)]


def bench_model() -> contextlib.AbstractContextManager[Subject]:
    """Mixtral, 440 MB of float32."""
    return _mixtral("bench", vocab_size=8192, hidden_size=512, intermediate_size=1024, num_attention_heads=8)


def light_model() -> contextlib.AbstractContextManager[Subject]:
    """A Mixtral of 0.5 MB, whose compute is next to nothing: what is left is the way there and back."""
    return _mixtral(
        "light", vocab_size=256, hidden_size=64, intermediate_size=64, num_attention_heads=4, initializer_range=0.2
    )


@contextlib.contextmanager
def _mixtral(name: str, **sizes: float) -> Iterator[Subject]:
    """Eight layers of eight experts, random with seed 0; two query heads share a head of keys."""
    config = MixtralConfig(
        num_hidden_layers=8,
        num_key_value_heads=int(sizes["num_attention_heads"]) // 2,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        dtype="float32",
        **sizes,
    )
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        torch.manual_seed(0)
        MixtralForCausalLM(config).save_pretrained(checkpoint)
        words = torch.randint(3, config.vocab_size, (4096,), generator=torch.Generator().manual_seed(0))
        yield packed(name, checkpoint, Path(folder) / "store", tuple(words.tolist()))


@contextlib.contextmanager
def demo() -> Iterator[Subject | None]:
    """None where the demo model has not been built (`shoal demo-model`)."""
    checkpoint = demo_checkpoint()
    if checkpoint is None:
        yield None
        return
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    words = tokenizer.encode(PROSE.read_text(), add_special_tokens=False).ids
    with tempfile.TemporaryDirectory() as folder:
        yield packed("demo", checkpoint, Path(folder) / "store", tuple(words))


def demo_checkpoint() -> Path | None:
    folder = platformdirs.user_cache_path("shoal") / build.NAME
    return build.build() if folder.exists() else None


def packed(name: str, checkpoint: Path, store: Path, words: tuple[int, ...]) -> Subject:
    return Subject(name, checkpoint, store, pack(checkpoint, UnitStore(store)), words)
