"""Which transformers model a checkpoint is, and which are refused by name with the reason.

Law: transformers' classes are the only source; code that a checkpoint brings along is never run.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from protos.errors import UnsupportedModel
from protos.manifest import DTYPES
from shard.anatomy import is_experts
from shard.conversion import listed
from shard.weights import dtype_name

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from shard.anatomy import Anatomy
    from shard.checkpoint import Checkpoint

ATTENTIONS: Final = ("full_attention", "sliding_attention", "attention")
"""Layer types whose state is keys and values by position, and which shard.attention masks: no chunked_attention."""

RECURRENT: Final = ("mamba", "linearattn", "recurrent", "rwkv", "deltanet", "shortconv", "lightning")
"""What transformers calls the modules of layers that keep another state, without underscores."""


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """transformers' configuration of a decoder for text, without its quantisation.  Raises UnsupportedModel."""
    family = checkpoint.config.get("model_type")
    if family not in CONFIG_MAPPING:
        raise UnsupportedModel(f"model type {family!r:.80} is not one that this transformers knows")
    fields = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    try:
        config: Any = CONFIG_MAPPING[family].from_dict(copy.deepcopy(fields))
    except Exception as error:
        raise UnsupportedModel(f"{family}: transformers cannot read its config.json: {error}") from error
    refuse_foreign(config)
    return config


def refuse_foreign(config: PretrainedConfig) -> None:
    """Raises UnsupportedModel for what its configuration alone says is no decoder for text that shoal can cut."""
    family = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{family} is an encoder-decoder; shoal serves decoders")
    if config.get_text_config() is not config or config.sub_configs:
        raise UnsupportedModel(f"{family} is multimodal; shoal serves models of text only")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedModel(f"{family} has no causal language model in transformers")
    kinds = set(getattr(config, "layer_types", None) or ()) - set(ATTENTIONS)
    if kinds:
        raise UnsupportedModel(_other_layers(family, kinds))


def choose_dtype(checkpoint: Checkpoint, config: PretrainedConfig, name: str | None) -> torch.dtype:
    """As from_pretrained does: what is asked for, the configuration's, or that of the first floating tensor."""
    chosen = getattr(torch, name) if name is not None else config.dtype
    if chosen is None:
        floating = (source.dtype for source in checkpoint.sources.values() if source.dtype.is_floating_point)
        chosen = next(floating, torch.float32)
    if dtype_name(chosen) not in DTYPES:
        raise UnsupportedModel(
            f"{config.model_type}: the checkpoint is in {dtype_name(chosen)}; shoal computes in {', '.join(DTYPES)}:"
            " name one of them as dtype"
        )
    return chosen  # type: ignore[no-any-return]


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The CausalLM with all parameters on the meta device: shapes and names, no memory.  Raises UnsupportedModel."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise UnsupportedModel(f"{config.model_type}: transformers cannot build it: {error}") from error
    modules = dict(model.named_modules())
    if not any(is_experts(module) for module in modules.values()):
        others = [name for name in modules if name.endswith("experts")]
        if others:
            raise UnsupportedModel(
                f"{config.model_type} keeps its experts ({others[0]}) outside of transformers' experts interface"
            )
        raise UnsupportedModel(f"{config.model_type} is dense: no layer has routed experts that can be shared out")
    return model


def refuse_recurrent(config: PretrainedConfig, anatomy: Anatomy) -> None:
    """Raises UnsupportedModel for layers whose state cannot be cut at a position, by their modules' names."""
    modules = anatomy.base.layers.named_modules()
    names = {name for name, module in modules if _is_recurrent(name) or _is_recurrent(type(module).__name__)}
    if names:
        raise UnsupportedModel(_other_layers(config.model_type, names))


def _other_layers(family: str, found: set[str]) -> str:
    return (
        f"{family} has layers of another kind than attention over all positions or a window"
        f" ({listed(sorted(found))}); shoal cannot cut or mask what they keep at a position"
    )


def _is_recurrent(name: str) -> bool:
    plain = name.lower().replace("_", "")
    return any(word in plain for word in RECURRENT)


def facts(config: PretrainedConfig, anatomy: Anatomy) -> dict[str, Any]:
    """What the manifest says about the model besides its units.  Raises UnsupportedModel."""
    family = config.model_type
    wanted = {"hidden": "hidden_size", "vocab": "vocab_size", "context": "max_position_embeddings"}
    sizes = {fact: getattr(config, name, None) for fact, name in wanted.items()}
    for fact, size in sizes.items():
        if not isinstance(size, int):
            raise UnsupportedModel(f"{family}: its configuration does not say {wanted[fact]}")
    return sizes | {
        "family": family,
        "architecture": type(anatomy.model).__name__,
        "layers": anatomy.layers,
        "experts": tuple(anatomy.expert_count(layer) for layer in range(anatomy.layers)),
        "top_k": _top_k(config, anatomy),
    }


def _top_k(config: PretrainedConfig, anatomy: Anatomy) -> int:
    """How many experts a row goes to: the configuration's word, or the routers'."""
    named = getattr(config, "num_experts_per_tok", None)
    if isinstance(named, int):
        return named
    counts = [getattr(module, "top_k", None) for module in anatomy.base.layers.modules()]
    found = {count for count in counts if isinstance(count, int)}
    if len(found) != 1:
        raise UnsupportedModel(f"{config.model_type}: nothing says how many experts a row goes to")
    return found.pop()
