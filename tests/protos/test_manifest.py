import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from specimen import EMBEDDING, expert, manifest, with_unit

from protos import limits, units
from protos.errors import InvalidManifest, UnitMissing
from protos.ids import UnitHash, UnitName
from protos.manifest import Manifest, TensorEntry

VALID = manifest().to_bytes()


def accepts_or_refuses(data: bytes) -> None:
    """The two allowed outcomes: InvalidManifest, or a manifest whose canonical bytes are these."""
    try:
        found = Manifest.from_bytes(data)
    except InvalidManifest:
        return
    assert found.to_bytes() == data


def altered(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(VALID)
    change(document)
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def test_bytes_give_back_the_manifest():
    assert Manifest.from_bytes(VALID) == manifest()
    assert Manifest.from_bytes(VALID).model_id == manifest().model_id


def test_the_model_id_depends_on_every_field():
    others = (
        manifest(oracle="eager"),
        manifest(recompute_at=64),
        with_unit(units.HEAD, size=1),
        with_unit(units.HEAD, sha256=UnitHash("0" * 64)),
    )
    assert len({manifest().model_id, *(other.model_id for other in others)}) == 5


def test_units_are_found_by_name_and_their_sizes_add_up():
    whole = manifest()
    assert whole.unit(units.trunk(1)).name == "trunk.1"
    assert whole.size([units.TEXT, units.EMBED]) == 77 + 4096
    with pytest.raises(UnitMissing, match=r"has no unit 'expert\.0\.0'"):
        whole.unit(units.expert(0, 0))


def test_a_head_that_lists_embeds_tensor_is_tied():
    assert manifest().tied
    assert not with_unit(units.HEAD, tensors=(TensorEntry("lm_head.weight", "bfloat16", (64, 16)),)).tied


@given(st.binary(max_size=300))
@example(b"")
@example(b"{}\n")
@example(b"NaN")
@example(b"\xff\xfe{\0}\0")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"1" * 5000)
def test_any_bytes_are_a_manifest_or_are_refused(data: bytes):
    accepts_or_refuses(data)


@given(st.data())
def test_altered_bytes_are_another_manifest_or_are_refused(choice: st.DataObject):
    data = bytearray(VALID)
    for _ in range(choice.draw(st.integers(1, 3))):
        at = choice.draw(st.integers(0, len(data) - 1))
        data[at : at + choice.draw(st.integers(0, 2))] = choice.draw(st.binary(max_size=2))
    accepts_or_refuses(bytes(data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def spots(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(spot for key, child in inner for spot in spots(child, (*path, key)))]


SPOTS = [spot for spot in spots(json.loads(VALID)) if spot]


@settings(max_examples=300)
@given(st.sampled_from(SPOTS), JSON)
def test_any_value_in_any_place_is_a_manifest_or_is_refused(spot: tuple[str | int, ...], value: object):
    def change(document: Any) -> None:
        for key in spot[:-1]:
            document = document[key]
        document[spot[-1]] = value

    accepts_or_refuses(altered(change))


@given(st.integers(0, len(VALID) - 1))
def test_a_truncated_manifest_is_refused(length: int):
    with pytest.raises(InvalidManifest):
        Manifest.from_bytes(VALID[:length])


@pytest.mark.parametrize(
    "data",
    [
        VALID[:-1],
        VALID + b"\n",
        VALID.replace(b",", b", ", 1),
        VALID.replace(b'"vocab":64', b'"vocab":6.4e1'),
        VALID.replace(b"mixtral", b"m\\u0069xtral"),
        VALID.replace(b'"vocab":64}', b'"vocab":64,"vocab":64}'),
        json.dumps(json.loads(VALID)).encode(),
    ],
)
def test_only_the_canonical_spelling_is_a_manifest(data: bytes):
    with pytest.raises(InvalidManifest):
        Manifest.from_bytes(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format is 2; it must be a whole number from 1 to 1"),
        ({"family": "Mix tral"}, "family is 'Mix tral'; it must match"),
        ({"family": "x" * (limits.NAME_CHARS_MAX + 1)}, "in at most 64 characters"),
        ({"architecture": ""}, "architecture is ''"),
        ({"dtype": "float8"}, "dtype is 'float8'; it must be one of"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": limits.LAYERS_MAX + 1}, f"layers is {limits.LAYERS_MAX + 1}"),
        ({"layers": True}, "layers is True"),
        ({"experts": (0, 2, 0)}, "experts has 3 numbers for 2 layers"),
        ({"experts": (0, 0)}, "a dense model"),
        ({"experts": (0, limits.EXPERTS_MAX + 1)}, f"experts is {limits.EXPERTS_MAX + 1}"),
        ({"top_k": 3}, "top_k is 3; it must be a whole number from 1 to 2"),
        ({"hidden": limits.HIDDEN_MAX + 1}, "hidden is"),
        ({"vocab": limits.VOCAB_MAX + 1}, "vocab is"),
        ({"grain": 3}, "grain is 3; it must be a whole number from 1 to 2"),
        ({"context": limits.CONTEXT_MAX + 1}, "context is"),
        ({"recompute_at": 129}, "recompute_at is 129; it must be a whole number from 1 to 128"),
        ({"oracle": "grouped mm"}, "oracle is"),
        ({"has_tokenizer": 1}, "has_tokenizer is 1"),
        ({"experts": (2, 2)}, "it must list exactly the 9 units"),
        ({"units": ()}, "units has 0 entries"),
        ({"units": manifest().units[::-1]}, "in their order"),
    ],
)
def test_each_rule_of_the_model_is_named(changes: dict[str, Any], message: str):
    with pytest.raises(InvalidManifest, match=message):
        manifest(**changes)


A, B = TensorEntry("a", "float32", (1,)), TensorEntry("b", "float32", (1,))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("trunk.0", {"sha256": "0" * 63}, "trunk.0: sha256 is"),
        ("trunk.0", {"sha256": "A" * 64}, "trunk.0: sha256 is"),
        ("trunk.0", {"size": 0}, "trunk.0: size is 0"),
        ("trunk.0", {"size": limits.UNIT_BYTES_MAX + 1}, "trunk.0: size is"),
        ("text", {"tensors": (A,)}, "text: it must have no tensors"),
        ("trunk.0", {"tensors": (B, A)}, "names must ascend"),
        ("trunk.0", {"tensors": (A, A)}, "names must ascend"),
        ("trunk.0", {"tensors": (replace(A, name="a b"),)}, "a tensor's name is 'a b'"),
        (
            "trunk.0",
            {"tensors": (replace(A, name="x" * (limits.TENSOR_NAME_CHARS_MAX + 1)),)},
            "at most 256 characters",
        ),
        ("trunk.0", {"tensors": (replace(A, dtype="float8_e4m3fn"),)}, "a: dtype is 'float8_e4m3fn'"),
        ("trunk.0", {"tensors": (replace(A, shape=(1,) * (limits.TENSOR_RANK_MAX + 1)),)}, "rank 9; at most 8"),
        ("trunk.0", {"tensors": (replace(A, shape=(-1,)),)}, "a: shape is -1"),
        ("trunk.0", {"tensors": (replace(A, shape=(limits.TENSOR_DIM_MAX + 1,)),)}, "a: shape is"),
        ("trunk.0", {"tensors": (replace(A, unit=UnitName("embed")),)}, "refers to unit 'embed', which holds no such"),
        ("trunk.0", {"tensors": (replace(A, unit=UnitName("trunk.0")),)}, "refers to unit 'trunk.0'"),
        ("trunk.0", {"tensors": (replace(EMBEDDING, unit=UnitName("head")),)}, "refers to unit 'head'"),
        ("head", {"tensors": (replace(EMBEDDING, unit=UnitName("embed"), shape=(64, 17)),)}, "no such tensor"),
    ],
)
def test_each_rule_of_a_unit_is_named(name: str, changes: dict[str, Any], message: str):
    with pytest.raises(InvalidManifest, match=message):
        with_unit(UnitName(name), **changes)


def test_the_largest_numbers_are_accepted():
    name = "x" * limits.NAME_CHARS_MAX
    largest = manifest(
        family=name, hidden=limits.HIDDEN_MAX, vocab=limits.VOCAB_MAX, context=limits.CONTEXT_MAX,
        recompute_at=limits.CONTEXT_MAX,
    )  # fmt: skip
    assert Manifest.from_bytes(largest.to_bytes()) == largest
    tensor = TensorEntry("x" * limits.TENSOR_NAME_CHARS_MAX, "uint8", (limits.TENSOR_DIM_MAX,) * limits.TENSOR_RANK_MAX)
    assert with_unit(units.trunk(0), size=limits.UNIT_BYTES_MAX, tensors=(tensor,)).unit(units.trunk(0)).tensors == (
        tensor,
    )


def test_a_model_has_at_most_so_many_experts_in_a_layer():
    rest = manifest().units
    many = tuple(expert(1, e) for e in range(limits.EXPERTS_MAX))
    assert manifest(experts=(0, limits.EXPERTS_MAX), units=(*rest[:4], *many, rest[-1])).size([units.expert(1, 4095)])


def test_a_model_has_at_most_so_many_units():
    layers = limits.MANIFEST_UNITS_MAX // limits.EXPERTS_MAX
    with pytest.raises(InvalidManifest, match=f"units; at most {limits.MANIFEST_UNITS_MAX} are allowed"):
        manifest(layers=layers, experts=(limits.EXPERTS_MAX,) * layers)


def test_a_model_has_at_most_so_many_tensors():
    with pytest.raises(InvalidManifest, match=f"tensors; at most {limits.MANIFEST_TENSORS_MAX} are allowed"):
        with_unit(units.trunk(0), tensors=(A,) * limits.MANIFEST_TENSORS_MAX)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bytes(limits.MANIFEST_BYTES_MAX + 1), f"has {limits.MANIFEST_BYTES_MAX + 1} bytes"),
        (bytes(limits.MANIFEST_BYTES_MAX), "is no JSON"),
        (b"{" * (limits.MANIFEST_UNITS_MAX + limits.MANIFEST_TENSORS_MAX + 2), "more than 655361 '{'"),
        (b"[" * (limits.MANIFEST_UNITS_MAX + limits.MANIFEST_TENSORS_MAX + 3), "more than 655362 '\\['"),
        (b"," * (16 * limits.MANIFEST_TENSORS_MAX + 1), "more than 8388608 ','"),
    ],
    ids=["bytes above", "bytes at", "objects", "lists", "values"],
)
def test_limits_are_checked_before_parsing(data: bytes, message: str):
    with pytest.raises(InvalidManifest, match=message):
        Manifest.from_bytes(data)


def test_what_could_not_be_read_back_cannot_be_made(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("protos.manifest.MANIFEST_BYTES_MAX", len(VALID) - 1)
    with pytest.raises(InvalidManifest, match=f"the manifest has {len(VALID)} bytes"):
        manifest()
