"""What does not fit is refused before a weight is read, and says how much would."""

from dataclasses import replace

import psutil
import pytest
from toy_node import manifest

from node import model
from node.config import Config
from protos.errors import InvalidRequest, OutOfMemory
from protos.ids import UnitHash
from protos.manifest import UnitEntry

MIB = 1 << 20
# Nine units, of which `text` is no weight: 8 MiB.
TOY = replace(manifest(), units=tuple(UnitEntry(unit.name, UnitHash("ab" * 32), MIB, ()) for unit in manifest().units))


def test_weights_are_all_units_but_text() -> None:
    assert model.weights_bytes(TOY) == 8 * MIB


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
    with pytest.raises(OutOfMemory, match=says):
        model.kv_bytes_max(Config(**settings), TOY)


@pytest.mark.parametrize(
    ("settings", "kv_bytes_max"),
    [
        ({"memory_limit": 9 * MIB}, MIB),
        ({"memory_limit": 12 * MIB, "kv_limit": 2 * MIB}, 2 * MIB),
        ({"kv_limit": 3 * MIB}, 3 * MIB),
    ],
)
def test_kv_gets_what_was_said_or_what_is_left(settings: dict[str, int], kv_bytes_max: int) -> None:
    assert model.kv_bytes_max(Config(**settings), TOY) == kv_bytes_max


def test_without_any_limit_kv_gets_a_share_of_the_free_memory() -> None:
    assert 0 < model.kv_bytes_max(Config(), TOY) < psutil.virtual_memory().total / 2


def test_a_device_that_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(InvalidRequest, match="no device cuda:63"):
        model.find_device("cuda:63")
    assert model.find_device("cpu").type == "cpu"
