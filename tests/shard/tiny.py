"""Tiny random checkpoints of the ten families that must work, one function for the config and one for the files.
Law: the same (family, seed, overrides) gives the same weights, and every part of the model has a say in the tokens."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

FAMILIES = (
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "gpt_oss",
    "granitemoe",
    "phimoe",
    "glm4_moe",
)

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "routed_scaling_factor": 1.5,
}
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "deepseek_v2": LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "deepseek_v3": LATENT | {"n_group": 4, "topk_group": 2, "num_mtp_layers": 0},
    "gpt_oss": {
        "num_hidden_layers": 4,
        "num_local_experts": 8,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 8.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 64,
        },
    },
    "granitemoe": {
        "num_local_experts": 8,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.25,
    },
    "phimoe": {
        "num_local_experts": 8,
        "sliding_window": None,
        "attention_bias": True,
        "lm_head_bias": True,
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.05, 1.1, 1.2],
            "long_factor": [1.0, 1.5, 3.0, 6.0],
            "short_mscale": 1.1,
            "long_mscale": 1.3,
        },
    },
    "glm4_moe": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 24,
        "head_dim": 8,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "attention_bias": True,
        "num_mtp_layers": 0,
    },
}
EMBEDDING_STD = 0.6
LOGITS_STD = 2.5  # wide enough that near-ties of the two best tokens are rare
SMALL_STD = 0.2  # biases, sinks, and how far norm weights are from 1


def config(family: str, **overrides: Any) -> PreTrainedConfig:
    """The family's config with every size shrunk; `overrides` are config fields, e.g. sliding_window=8."""
    fields = COMMON | OWN[family] | overrides
    if fields["num_hidden_layers"] != len(fields.get("layer_types") or [None] * fields["num_hidden_layers"]):
        fields["layer_types"] = [fields["layer_types"][layer % 2] for layer in range(fields["num_hidden_layers"])]
    made: PreTrainedConfig = AutoConfig.for_model(family, **fields)
    return made


def model(family: str, dtype: str = "float32", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random CausalLM of the family, in `dtype`, in eval mode."""
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config(family, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    head = made.get_output_embeddings().weight
    for name, tensor in sorted(made.state_dict().items()):
        _fill(name, tensor, generator)
    if not made.config.tie_word_embeddings:
        head.data.mul_(LOGITS_STD)
    if dtype == "float32":
        return made.eval()
    reduced = AutoModelForCausalLM.from_config(made.config, dtype=getattr(torch, dtype))
    reduced.load_state_dict(
        made.state_dict()
    )  # .to(dtype) would round the RoPE frequencies too; from_pretrained does not
    return reduced.eval()


def save(family: str, folder: Path, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
    """Writes a checkpoint of `model(...)` to `folder` as transformers does, and returns the folder."""
    made = model(family, dtype, seed, **overrides)
    made.config.dtype = dtype
    made.generation_config.do_sample = False
    made.save_pretrained(folder)
    return folder


def _fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name and name.endswith("weight"):
        tensor.copy_(1.0 + SMALL_STD * noise)
    elif tensor.dim() < 2 or name.endswith("bias"):
        tensor.copy_(SMALL_STD * noise)
    elif "embed_tokens" in name:
        tensor.copy_(EMBEDDING_STD * noise)
    else:
        # About 1/sqrt(fan in): GPT-OSS keeps experts as [E, in, out], all others as [.., out, in]; no need to tell.
        tensor.copy_(noise * math.sqrt(2.0 / tensor.shape[-1]))
