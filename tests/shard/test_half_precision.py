"""A checkpoint in half precision, packed and read back from its units, gives transformers' logits to the bit.
Law: the oracle loads the same checkpoint from the disk, in the same dtype, with the experts that the manifest names."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from protos import units
from protos.manifest import Manifest
from shard.body import Body, parse_config
from shard.experts import ExpertBank
from shard.kv import RaggedCache, SessionKv, Slice
from shard.pack import pack
from shard.weights import UnitStore

LENGTH = 40
CPU = torch.device("cpu")

pytestmark = pytest.mark.families


def body_of(store: UnitStore, manifest: Manifest, dtype: torch.dtype) -> Body:
    """As node.model.load holds it."""
    bank = ExpertBank()
    config = parse_config(store.text(manifest)["config.json"])
    body = Body(config, dtype, range(manifest.layers), lambda name: store.tensors(manifest, name), bank, CPU)
    for layer, (_, module) in body.anatomy.experts.items():
        bank.add_layer(layer, module)
        for expert in range(manifest.experts[layer]):
            bank.add(layer, expert, store.tensors(manifest, units.expert(layer, expert)))
    return body


def prefilled(body: Body, tokens: torch.Tensor) -> torch.Tensor:
    kv = SessionKv(body.kv_layers, LENGTH, CPU)
    cache = RaggedCache((Slice(kv, 0, 0, LENGTH),), body.direct)
    return body.head(body.forward(tokens, None, torch.arange(LENGTH)[None], cache, [LENGTH]))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_packed_half_precision_gives_the_logits_of_transformers_to_the_bit(
    family: str, name: str, tmp_path: Path
) -> None:
    checkpoint, store = tiny.save(family, tmp_path / "checkpoint", name), UnitStore(tmp_path / "store")
    dtype = getattr(torch, name)
    manifest = pack(checkpoint, store)
    assert manifest.dtype == name
    oracle: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, experts_implementation="grouped_mm")
    tokens = torch.randint(3, 128, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = oracle(tokens).logits[0]
        found = prefilled(body_of(store, manifest, dtype), tokens)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
