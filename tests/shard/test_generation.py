"""A checkpoint's generation configuration is followed or refused by name."""

import json
from typing import Any

import pytest
from transformers import GenerationConfig

from protos.errors import UnsupportedModel
from shard.generation import ABSENT, NEUTRAL, SAMPLER, check_generation

# What decides how long generate goes on, how it is fast, or what it returns beside the tokens; never which token.
WITHOUT_EFFECT = {
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "bos_token_id", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
    "decoder_start_token_id", "disable_compile", "do_sample", "early_stopping", "eos_token_id", "is_assistant",
    "length_penalty", "low_memory", "max_cache_len", "max_length", "max_matching_ngram_size", "max_new_tokens",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "pad_token_id", "prefill_chunk_size", "prompt_lookup_num_tokens",
    "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version", "use_cache", "use_mtp",
    "_from_model_config",
}  # fmt: skip


def check(**fields: Any) -> None:
    check_generation({"generation_config.json": json.dumps(fields).encode()}, {})


def test_every_field_of_this_transformers_has_a_verdict() -> None:
    """A new version's new field fails here, before it is dropped silently."""
    assert {*ABSENT, *NEUTRAL, *SAMPLER, *WITHOUT_EFFECT} == GenerationConfig().to_dict().keys()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1, 2], "max_length": 4096},
        dict.fromkeys(ABSENT),
        {"suppress_tokens": [], "remove_invalid_values": False, "renormalize_logits": False},
        dict(NEUTRAL),
        {"chat_format": "chatml", "max_window_size": 6144},
    ],
)
def test_what_the_sampler_does_and_what_changes_nothing_passes(fields: dict[str, Any]) -> None:
    check(**fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("suppress_tokens", [3]), ("begin_suppress_tokens", [3]), ("no_repeat_ngram_size", 2), ("bad_words_ids", [[3]]),
        ("min_length", 5), ("min_new_tokens", 1), ("typical_p", 0.9), ("epsilon_cutoff", 3e-4), ("eta_cutoff", 3e-4),
        ("top_h", 0.4), ("num_beams", 2), ("sequence_bias", [[[3], 1.0]]), ("forced_bos_token_id", 0),
        ("forced_eos_token_id", 2), ("exponential_decay_length_penalty", [5, 1.1]), ("remove_invalid_values", True),
        ("guidance_scale", 1.5), ("encoder_repetition_penalty", 1.1), ("encoder_no_repeat_ngram_size", 2),
        ("penalty_alpha", 0.6), ("dola_layers", "low"), ("watermarking_config", {"bias": 2.0}),
        ("stop_strings", ["\n"]), ("renormalize_logits", True), ("cache_implementation", "quantized"),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_its_name(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match=rf"generation_config.json sets {field} to"):
        check(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0), ("temperature", "hot"), ("top_k", -1), ("top_k", 2.5), ("top_p", 1.5), ("min_p", -0.1),
        ("repetition_penalty", 0.0), ("eos_token_id", -1), ("eos_token_id", ["</s>"]),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_its_field(field: str, value: object) -> None:
    with pytest.raises(UnsupportedModel, match=rf"generation_config.json: {field}"):
        check(**{field: value})


def test_without_a_file_of_its_own_the_fields_count_where_config_json_has_them() -> None:
    check_generation({}, {"model_type": "mixtral", "eos_token_id": 2, "num_experts_per_tok": 2})
    with pytest.raises(UnsupportedModel, match=r"config.json sets no_repeat_ngram_size to 3"):
        check_generation({}, {"model_type": "mixtral", "no_repeat_ngram_size": 3})


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"num_beams": ', b'{"cache_implementation": "none such"}'])
def test_a_file_that_transformers_cannot_read_is_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedModel, match=r"generation_config.json"):
        check_generation({"generation_config.json": data}, {})
