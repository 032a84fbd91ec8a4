"""The demo model's sizes, its configuration files as Python values, and the names of all its files.

Law: no torch, so that a look into the cache costs a moment.
"""

from collections.abc import Mapping
from typing import Any

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "LICENSE",
    "NOTICE",
)  # fmt: skip

LAYERS, HIDDEN, HEADS, KV_HEADS = 30, 576, 9, 3
SHARED, EXPERT = 768, 48  # neurons of the shared expert, and of each routed one
EXPERTS, TOP_K = 16, 4

CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "dtype": "bfloat16",
    "vocab_size": 49152,
    "hidden_size": HIDDEN,
    "intermediate_size": SHARED + EXPERTS * EXPERT,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "qkv_bias": False,
    "use_sliding_window": False,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "moe_intermediate_size": EXPERT,
    "shared_expert_intermediate_size": SHARED,
    "norm_topk_prob": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}

GENERATION_CONFIG: Mapping[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    # So small a model repeats itself when it answers greedily; who takes the checkpoint's defaults is spared that.
    "repetition_penalty": 1.05,
}
