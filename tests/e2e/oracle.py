"""What transformers answers to a checkpoint, in float32, and when another answer is excused.

Law (design.md, section 4): tokens are identical; a mismatch is excused only where the reference's two best logits lie
within NEAR_TIE of each other at the FIRST position that differs, and every excuse is printed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tiny
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from shard.pack import pack
from shard.weights import UnitStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from protos.manifest import Manifest

    Oracles = Callable[[str], "Oracle"]

NEAR_TIE = 1e-4
LAYERS = 4  # of the tiny checkpoints: enough for four spans


@dataclass
class Oracle:
    """A checkpoint, the store that it is packed in, and transformers' model of it."""

    store: Path
    manifest: Manifest
    model: Any
    known: dict[tuple[tuple[int, ...], int], tuple[list[int], list[float]]] = field(default_factory=dict)

    def tokens(self, prompt: Sequence[int], new: int) -> list[int]:
        return self._ask(prompt, new)[0]

    def excuses(self, prompt: Sequence[int], answer: Sequence[int]) -> bool:
        """Whether `answer` is the reference's, or first differs from it at a near-tie.  Says what differs."""
        expected, margins = self._ask(prompt, len(answer))
        differing = [n for n, (ours, theirs) in enumerate(zip(answer, expected, strict=True)) if ours != theirs]
        if not differing:
            return True
        first = differing[0]
        near = margins[first] < NEAR_TIE
        print(
            f"{'EXCUSED' if near else 'WRONG'}: {self.manifest.family}: token {first} of {len(answer)} to a prompt "
            f"of {len(prompt)} is {answer[first]}, transformers says {expected[first]} with a margin of "
            f"{margins[first]:.2e}"
        )
        return near

    def prompt(self, length: int, seed: int = 3) -> list[int]:
        generator = torch.Generator().manual_seed(seed * 1000 + length)
        return torch.randint(3, min(self.manifest.vocab, 1000), (length,), generator=generator).tolist()  # type: ignore[no-any-return]

    def _ask(self, prompt: Sequence[int], new: int) -> tuple[list[int], list[float]]:
        key = tuple(prompt), new
        if key not in self.known:
            ids = torch.tensor([list(prompt)])
            output = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                return_dict_in_generate=True,
                output_logits=True,
            )
            best = [torch.topk(logits[0].float(), 2).values for logits in output.logits]
            found: list[int] = output.sequences[0, len(prompt) :].tolist()
            self.known[key] = found, [float(two[0] - two[1]) for two in best]
        return self.known[key]


def of_family(family: str, folder: Path) -> Oracle:
    """A tiny random checkpoint of the family, packed."""
    return of_checkpoint(tiny.save(family, folder / "checkpoint", num_hidden_layers=LAYERS), folder / "store")


def of_checkpoint(checkpoint: Path, store: Path) -> Oracle:
    """Any checkpoint, packed as float32; transformers reads the same files."""
    manifest = pack(checkpoint, UnitStore(store), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, experts_implementation=manifest.oracle
    )
    # The checkpoint's own generation config may sample, penalise or end: what is compared is the greedy continuation.
    model.generation_config = GenerationConfig(pad_token_id=0)
    return Oracle(store, manifest, model.eval())
