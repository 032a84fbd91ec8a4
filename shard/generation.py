"""How a checkpoint wants its answers chosen: its generation configuration, as transformers' `generate` takes it.

Law: what would change `generate`'s answer and the sampler does not do is refused by name; nothing is dropped silently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from transformers import GenerationConfig

from protos.errors import InvalidRequest, UnsupportedModel
from protos.sampling import SamplingParams
from shard.checkpoint import CONFIG, GENERATION_CONFIG, parse_object

if TYPE_CHECKING:
    from collections.abc import Mapping

ABSENT: Final = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "constraints",
    "dola_layers",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "max_time",
    "remove_invalid_values",
    "renormalize_logits",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "token_healing",
    "top_h",
    "watermarking_config",
)
"""Fields of _get_logits_processor, _get_stopping_criteria and get_generation_mode that have no neutral value."""

NEUTRAL: Final = {
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "typical_p": 1.0,
}
"""Their fields that have one."""

SAMPLER: Final = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What the sampler does.  Lengths are the client's word, and caches and drafts do not change an answer."""


def check_generation(files: Mapping[str, bytes], config: Mapping[str, Any]) -> None:
    """`files`: a checkpoint's small ones; `config`: the fields of its config.json.  Raises UnsupportedModel."""
    name, generation = _read(files, config)
    for field in (*ABSENT, *NEUTRAL):
        value = getattr(generation, field, None)
        if not _is_neutral(field, value):
            raise UnsupportedModel(_refusal(name, field, value))
    if generation.cache_implementation == "quantized":
        raise UnsupportedModel(_refusal(name, "cache_implementation", "quantized"))
    _check_sampler(name, generation)


def _read(files: Mapping[str, bytes], config: Mapping[str, Any]) -> tuple[str, Any]:
    """As from_pretrained: where a checkpoint has no file of its own for it, config.json may hold the fields."""
    name = GENERATION_CONFIG if GENERATION_CONFIG in files else CONFIG
    try:
        if name == CONFIG:
            return name, GenerationConfig.from_model_config(dict(config))
        return name, GenerationConfig.from_dict(parse_object(name, files[name]))
    except UnsupportedModel:
        raise
    except Exception as error:
        raise UnsupportedModel(f"{name}: transformers cannot read how to generate: {error}") from error


def _is_neutral(field: str, value: object) -> bool:
    if field in NEUTRAL:
        return value is None or value == NEUTRAL[field]
    return value is None or value is False or value in ([], {}, "")


def _refusal(name: str, field: str, value: object) -> str:
    return (
        f"{name} sets {field} to {value!r:.80}, which shoal's sampler does not do: answers would differ from those of"
        " transformers' generate; take it out to pack the checkpoint without"
    )


def _check_sampler(name: str, generation: Any) -> None:
    given = {field: getattr(generation, field) for field in SAMPLER}
    ends = generation.eos_token_id
    tokens = () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,)
    try:
        SamplingParams(**{field: value for field, value in given.items() if value is not None})
    except InvalidRequest as error:
        raise UnsupportedModel(f"{name}: {error}") from error
    try:
        SamplingParams(stop_tokens=tokens)
    except InvalidRequest as error:
        raise UnsupportedModel(f"{name}: eos_token_id becomes the answer's stop tokens, and {error}") from error
