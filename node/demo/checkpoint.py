"""The demo model as a Hugging Face checkpoint: the dense model's layers cut into experts by the patch.

For each layer the patch has an order of the MLP's neurons, a router, new norms and rank-8 adapters.  In the new order
the first neurons are the shared expert, the rest are the routed experts, one slice after the other.
Law: equal sources give equal bytes, on every machine.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file

from node.demo.dense import Dense
from node.demo.settings import CONFIG, EXPERT, EXPERTS, GENERATION_CONFIG, HEADS, KV_HEADS, LAYERS, SHARED
from node.demo.source import Progress
from node.demo.tokenizer import tokenizer, tokenizer_config

State: TypeAlias = dict[str, torch.Tensor]

CUTTING, WRITING = "cutting layers into experts", "writing the checkpoint"

DATA = Path(__file__).parent


def write(gguf: Path, folder: Path, progress: Progress) -> None:
    """Writes all FILES into `folder`, which must not exist yet."""
    source = Dense(gguf)
    folder.mkdir()
    state = _state(source, load_file(DATA / "patch.safetensors"), progress)
    progress(WRITING, 0, 1)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer(source.metadata).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(source.metadata))
    _write_json(folder / "config.json", CONFIG)
    _write_json(folder / "generation_config.json", GENERATION_CONFIG)
    for name in ("LICENSE", "NOTICE"):
        shutil.copyfile(DATA / name, folder / name)
    progress(WRITING, 1, 1)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _state(source: Dense, patch: State, progress: Progress) -> State:
    """All tensors of the checkpoint, bfloat16; only one layer exists in float32 at a time."""
    state = {
        "model.embed_tokens.weight": source.weight("token_embd").bfloat16(),
        "model.norm.weight": patch["norm"].bfloat16(),
    }
    for index in range(LAYERS):
        progress(CUTTING, index, LAYERS)
        layer = _Layer(source, patch, index)
        for name, tensor in (layer.trunk() | layer.mlp()).items():
            state[f"model.layers.{index}.{name}"] = tensor.bfloat16().contiguous()
    progress(CUTTING, LAYERS, LAYERS)
    return state


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of the dense model together with its part of the patch."""

    source: Dense
    patch: State
    index: int

    def trunk(self) -> State:
        return {
            "input_layernorm.weight": self._patched("n1"),
            "post_attention_layernorm.weight": self._patched("n2"),
            "self_attn.q_proj.weight": self._adapted(_unrotated(self._dense("attn_q"), HEADS), "q"),
            "self_attn.k_proj.weight": self._adapted(_unrotated(self._dense("attn_k"), KV_HEADS), "k"),
            "self_attn.v_proj.weight": self._adapted(self._dense("attn_v"), "v"),
            "self_attn.o_proj.weight": self._adapted(self._dense("attn_output"), "o"),
            "mlp.gate.weight": self._patched("router"),
            "mlp.shared_expert_gate.weight": self._patched("shared_gate")[None],
        }

    def mlp(self) -> State:
        """Slices of the reordered MLP.

        The dense MLP is the sum of its slices. A Qwen2-MoE layer weighs them: the shared one by a sigmoid that starts
        at 1/2, the routed ones by a softmax of about 1/EXPERTS. The down projections are scaled to undo that.
        """
        order = self._patched("perm").long()
        gate = self._adapted(self._dense("ffn_gate")[order], "g")
        up = self._adapted(self._dense("ffn_up")[order], "u")
        down = self._adapted(self._dense("ffn_down")[:, order], "d")

        def expert(name: str, first: int, size: int, scale: int) -> State:
            neurons = slice(first, first + size)
            return {
                f"mlp.{name}.gate_proj.weight": gate[neurons],
                f"mlp.{name}.up_proj.weight": up[neurons],
                f"mlp.{name}.down_proj.weight": down[:, neurons] * scale,
            }

        state = expert("shared_expert", 0, SHARED, 2)
        for e in range(EXPERTS):
            state |= expert(f"experts.{e}", SHARED + e * EXPERT, EXPERT, EXPERTS)
        return state

    def _dense(self, name: str) -> torch.Tensor:
        return self.source.weight(f"blk.{self.index}.{name}")

    def _patched(self, name: str) -> torch.Tensor:
        return self.patch[f"layers.{self.index}.{name}"]

    def _adapted(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        # float64 for the low-rank product, so that the bytes do not depend on how a machine orders a sum
        low_rank = self._patched(f"{name}.B").double() @ self._patched(f"{name}.A").double()
        return (weight + low_rank).float()


def _unrotated(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """GGUF interleaves the two halves of each head's rows (RoPE pairs side by side); transformers keeps them apart."""
    out, into = weight.shape
    return weight.view(heads, out // heads // 2, 2, into).transpose(1, 2).reshape(out, into)
