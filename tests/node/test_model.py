"""What does not fit is refused before a weight is read, and says how much would."""

import json
from dataclasses import replace
from typing import Any

import psutil
import pytest
import tiny
import torch
from toy_node import manifest

from node import model
from node.config import Config
from node.holding import whole
from protos import units
from protos.errors import InvalidManifest, InvalidRequest
from protos.ids import UnitHash
from protos.manifest import Manifest, UnitEntry
from shard.pack import pack
from shard.weights import UnitStore

MIB = 1 << 20
# Nine units, of which `text` is no weight: 8 MiB.
TOY = replace(manifest(), units=tuple(UnitEntry(unit.name, UnitHash("ab" * 32), MIB, ()) for unit in manifest().units))


WEIGHTS = TOY.size(whole(TOY).units(TOY))


def test_weights_are_all_units_but_text() -> None:
    assert WEIGHTS == 8 * MIB


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"memory_limit": 8 * MIB}, "needs 8.0 MiB for its weights, and some for KV, but memory_limit is 8.0 MiB"),
        (
            {"memory_limit": 9 * MIB, "kv_limit": 2 * MIB},
            "weights and 2.0 MiB for KV .kv_limit., but memory_limit is 9.0",
        ),
    ],
)
def test_a_limit_below_what_is_needed_names_both(settings: dict[str, int], says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        model.kv_bytes_max(Config(**settings), TOY, WEIGHTS)


@pytest.mark.parametrize(
    ("settings", "kv_bytes_max"),
    [
        ({"memory_limit": 9 * MIB}, MIB),
        ({"memory_limit": 12 * MIB, "kv_limit": 2 * MIB}, 2 * MIB),
        ({"kv_limit": 3 * MIB}, 3 * MIB),
    ],
)
def test_kv_gets_what_was_said_or_what_is_left(settings: dict[str, int], kv_bytes_max: int) -> None:
    assert model.kv_bytes_max(Config(**settings), TOY, WEIGHTS) == kv_bytes_max


def test_without_any_limit_kv_gets_a_share_of_the_free_memory() -> None:
    assert 0 < model.kv_bytes_max(Config(), TOY, WEIGHTS) < psutil.virtual_memory().total / 2


def test_a_device_that_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidRequest, match="no device cuda:63"):
        model.find_device("cuda:63")
    assert model.find_device("cpu").type == "cpu"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[UnitStore, Manifest]:
    home = tmp_path_factory.mktemp("packed")
    store = UnitStore(home / "store")
    return store, pack(tiny.save("mixtral", home / "checkpoint"), store)


def with_text(store: UnitStore, whole: Manifest, files: dict[str, bytes]) -> Manifest:
    """The same model with another text unit, as a peer might send it."""
    octets = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in files.items()}
    text = store.add_unit(units.TEXT, octets)
    return replace(whole, units=(text, *whole.units[1:]))


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("layers", {"num_hidden_layers": 4}),
        ("experts", {"num_local_experts": 4}),
        ("vocab", {"vocab_size": 127}),
        ("context", {"max_position_embeddings": 1 << 20}),
        ("hidden", {"hidden_size": 64}),
        ("top_k", {"num_experts_per_tok": 1}),
        ("dtype", {"dtype": "bfloat16"}),
    ],
)
def test_a_manifest_that_its_configuration_contradicts_is_refused_by_the_field(
    field: str, changed: dict[str, Any], packed: tuple[UnitStore, Manifest]
) -> None:
    store, whole = packed
    files = store.text(whole)
    config = json.dumps(json.loads(files["config.json"]) | changed).encode()
    other = with_text(store, whole, files | {"config.json": config})
    store.add_manifest(other)
    with pytest.raises(InvalidManifest, match=f"says {field} "):
        model.load(Config(store=store.root, model=other.model_id), lambda what, done, total: None)


def test_a_text_unit_without_a_configuration_is_refused(packed: tuple[UnitStore, Manifest]) -> None:
    store, whole = packed
    with pytest.raises(InvalidManifest, match=r"no config\.json"):
        model.read_config({}, whole)
    assert model.read_config(store.text(whole), whole).vocab_size == whole.vocab


@pytest.mark.parametrize("field", ["family", "architecture"])
def test_a_manifest_of_another_family_is_refused_by_the_field(field: str, packed: tuple[UnitStore, Manifest]) -> None:
    store, whole = packed
    other = replace(whole, family="olmoe") if field == "family" else replace(whole, architecture="OlmoeForCausalLM")
    with pytest.raises(InvalidManifest, match=f"says {field} "):
        model.read_config(store.text(whole), other)
