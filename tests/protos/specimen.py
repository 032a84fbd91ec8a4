"""A small valid manifest (two layers, the first dense, a tied head), which tests alter."""

from dataclasses import replace
from typing import Any

from protos import units
from protos.ids import UnitHash, UnitName
from protos.manifest import Manifest, TensorEntry, UnitEntry

EMBEDDING = TensorEntry("embed_tokens.weight", "bfloat16", (64, 16))


def unit(name: UnitName, *tensors: TensorEntry, size: int = 4096) -> UnitEntry:
    return UnitEntry(name, UnitHash(f"{len(name):02x}" * 32), size, tensors)


def expert(layer: int, number: int) -> UnitEntry:
    down = TensorEntry("down_proj", "bfloat16", (16, 32))
    gate_up = TensorEntry("gate_up_proj", "bfloat16", (64, 16))
    return unit(units.expert(layer, number), down, gate_up)


def manifest(**changes: Any) -> Manifest:
    query = TensorEntry("self_attn.q_proj.weight", "bfloat16", (16, 16))
    whole = Manifest(
        family="mixtral",
        architecture="MixtralForCausalLM",
        dtype="bfloat16",
        layers=2,
        experts=(0, 2),
        top_k=2,
        hidden=16,
        vocab=64,
        grain=1,
        context=128,
        has_tokenizer=True,
        units=(
            unit(units.TEXT, size=77),
            unit(units.EMBED, EMBEDDING),
            unit(units.trunk(0), query),
            unit(units.trunk(1), TensorEntry("mlp.gate.weight", "float32", (2, 16)), query),
            expert(1, 0),
            expert(1, 1),
            unit(units.HEAD, replace(EMBEDDING, unit=units.EMBED), TensorEntry("norm.weight", "bfloat16", (16,))),
        ),
    )
    return replace(whole, **changes)


def with_unit(name: UnitName, **changes: Any) -> Manifest:
    """The specimen with one unit altered."""
    whole = manifest()
    return replace(whole, units=tuple(replace(e, **changes) if e.name == name else e for e in whole.units))
