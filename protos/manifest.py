"""What a model is made of: every unit with its hash, size and tensors, in a canonical text whose sha256 is its id.

Pure. A Manifest that exists is valid: whatever builds one, every rule of PROTOCOL.md, section 4, has been checked.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Final

from protos import units
from protos.errors import InvalidManifest, UnitMissing
from protos.ids import ModelId, UnitHash, UnitName
from protos.limits import (
    CONTEXT_MAX,
    EXPERTS_MAX,
    HIDDEN_MAX,
    LAYERS_MAX,
    MANIFEST_BYTES_MAX,
    MANIFEST_TENSORS_MAX,
    MANIFEST_UNITS_MAX,
    NAME_CHARS_MAX,
    TENSOR_DIM_MAX,
    TENSOR_NAME_CHARS_MAX,
    TENSOR_RANK_MAX,
    UNIT_BYTES_MAX,
    VOCAB_MAX,
)

FORMAT: Final = 1
DTYPES: Final = ("float32", "bfloat16", "float16")
"""What a model may be served in."""

TENSOR_DTYPES: Final = (*DTYPES, "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
"""What a unit may hold: weights in the model's dtype, and buffers."""

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_TENSOR_NAME = re.compile(r"[!-~]+")  # printable ASCII without space
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor of a unit. `unit`: its bytes are in that other unit under the same name (a tied head lists embed's)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    unit: UnitName | None = None


@dataclass(frozen=True, slots=True)
class UnitEntry:
    """A unit: its file's sha256 and size in bytes, and its tensors by ascending name (`text` has none)."""

    name: UnitName
    sha256: UnitHash
    size: int
    tensors: tuple[TensorEntry, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A model. Raises InvalidManifest, naming the field and the rule that it breaks."""

    format: int = FORMAT
    family: str
    """transformers' model_type, e.g. "mixtral"."""
    architecture: str
    """transformers' class, e.g. "MixtralForCausalLM"."""
    dtype: str
    layers: int
    experts: tuple[int, ...]
    """Routed experts of each layer; 0: the layer is dense."""
    top_k: int
    """Routed experts that each row of a layer goes to."""
    hidden: int
    """Values of a row between layers."""
    vocab: int
    """Rows of the output projection."""
    grain: int
    """Spans begin at multiples of so many layers."""
    context: int
    """Positions that the model supports."""
    recompute_at: int | None = None
    """When a session's length first exceeds this, all its KV is computed again (longrope); None: never."""
    oracle: str = "grouped_mm"
    """The experts function of transformers whose numbers are this model's answer."""
    has_tokenizer: bool
    units: tuple[UnitEntry, ...]
    """Every unit of the model, in units.order."""

    _by_name: dict[UnitName, UnitEntry] = field(init=False, repr=False, compare=False)
    _model_id: ModelId = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_scalars(self)
        _check_units(self)
        for entry in self.units:
            _check_unit(entry)
        _check_references(self)
        object.__setattr__(self, "_by_name", {entry.name: entry for entry in self.units})
        canonical = self.to_bytes()
        if len(canonical) > MANIFEST_BYTES_MAX:
            raise InvalidManifest(f"the manifest has {len(canonical)} bytes; at most {MANIFEST_BYTES_MAX} are allowed")
        object.__setattr__(self, "_model_id", ModelId(hashlib.sha256(canonical).hexdigest()))

    @property
    def model_id(self) -> ModelId:
        """sha256 of the canonical bytes."""
        return self._model_id

    @property
    def tied(self) -> bool:
        """The output projection is the embedding table."""
        return any(tensor.unit is not None for tensor in self.unit(units.HEAD).tensors)

    def unit(self, name: UnitName) -> UnitEntry:
        """The entry of a unit. Raises UnitMissing."""
        entry = self._by_name.get(name)
        if entry is None:
            raise UnitMissing(f"model {self.model_id[:12]} has no unit {name!r}")
        return entry

    def size(self, names: Iterable[UnitName]) -> int:
        """Bytes of these units' files in all."""
        return sum(self.unit(name).size for name in names)

    def to_bytes(self) -> bytes:
        """The canonical text: JSON, keys sorted, no spaces, ASCII, one newline at the end."""
        text = json.dumps(_document(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return text.encode("ascii") + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """The manifest in `data`; checked in order: limits, JSON, keys, rules, canonical. Raises InvalidManifest."""
        _check_limits(data)
        try:
            document = json.loads(data.decode("ascii"))
        except (ValueError, RecursionError) as error:
            raise InvalidManifest(f"the manifest is no JSON in ASCII: {error}") from error
        manifest = cls(**_read_manifest(document))
        if hashlib.sha256(data).hexdigest() != manifest.model_id:
            raise InvalidManifest("the manifest is not canonical: sorted keys, no spaces, ASCII, a newline at the end")
        return manifest


_TENSOR_KEYS = frozenset(("name", "dtype", "shape", "unit"))
_UNIT_KEYS = frozenset(("name", "sha256", "size", "tensors"))
_MANIFEST_KEYS = frozenset(entry.name for entry in fields(Manifest) if entry.init)


def _document(manifest: Manifest) -> dict[str, Any]:
    document: dict[str, Any] = {key: getattr(manifest, key) for key in _MANIFEST_KEYS}
    document["units"] = [
        {
            "name": entry.name,
            "sha256": entry.sha256,
            "size": entry.size,
            "tensors": [{key: getattr(tensor, key) for key in _TENSOR_KEYS} for tensor in entry.tensors],
        }
        for entry in manifest.units
    ]
    return document


def _check_limits(data: bytes) -> None:
    if len(data) > MANIFEST_BYTES_MAX:
        raise InvalidManifest(f"the manifest has {len(data)} bytes; at most {MANIFEST_BYTES_MAX} are allowed")
    # What parsing allocates depends on how many values the text holds, so they are counted before: an object per unit
    # and tensor, a list per object, and below 16 values per tensor.
    for mark, count_max in (
        (b"{", MANIFEST_UNITS_MAX + MANIFEST_TENSORS_MAX + 1),
        (b"[", MANIFEST_UNITS_MAX + MANIFEST_TENSORS_MAX + 2),
        (b",", 16 * MANIFEST_TENSORS_MAX),
    ):
        if data.count(mark) > count_max:
            raise InvalidManifest(f"the manifest has more than {count_max} {mark.decode()!r}: no model needs so many")


def _read_manifest(document: object) -> dict[str, Any]:
    entry = _object(document, _MANIFEST_KEYS, "the manifest")
    entry["experts"] = tuple(_list(entry["experts"], "experts"))
    entry["units"] = tuple(_read_unit(unit) for unit in _list(entry["units"], "units"))
    return entry


def _read_unit(document: object) -> UnitEntry:
    entry = _object(document, _UNIT_KEYS, "a unit")
    entry["tensors"] = tuple(_read_tensor(tensor) for tensor in _list(entry["tensors"], "a unit's tensors"))
    return UnitEntry(**entry)


def _read_tensor(document: object) -> TensorEntry:
    entry = _object(document, _TENSOR_KEYS, "a tensor")
    entry["shape"] = tuple(_list(entry["shape"], "a tensor's shape"))
    return TensorEntry(**entry)


def _object(value: object, keys: frozenset[str], what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or value.keys() != keys:
        raise InvalidManifest(f"{what} must be an object with exactly the keys {', '.join(sorted(keys))}")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise InvalidManifest(f"{what} must be a list, not {value!r:.80}")
    return value


def _check_scalars(manifest: Manifest) -> None:
    _whole("format", manifest.format, FORMAT, FORMAT)
    _spelled("family", manifest.family, _NAME, NAME_CHARS_MAX)
    _spelled("architecture", manifest.architecture, _NAME, NAME_CHARS_MAX)
    _one_of("dtype", manifest.dtype, DTYPES)
    _whole("layers", manifest.layers, 1, LAYERS_MAX)
    _check_experts(manifest)
    _whole("hidden", manifest.hidden, 1, HIDDEN_MAX)
    _whole("vocab", manifest.vocab, 1, VOCAB_MAX)
    _whole("grain", manifest.grain, 1, manifest.layers)
    _whole("context", manifest.context, 1, CONTEXT_MAX)
    if manifest.recompute_at is not None:
        _whole("recompute_at", manifest.recompute_at, 1, manifest.context)
    _spelled("oracle", manifest.oracle, _NAME, NAME_CHARS_MAX)
    if not isinstance(manifest.has_tokenizer, bool):
        raise InvalidManifest(f"has_tokenizer is {manifest.has_tokenizer!r:.80}; it must be true or false")


def _check_experts(manifest: Manifest) -> None:
    if len(manifest.experts) != manifest.layers:
        raise InvalidManifest(f"experts has {len(manifest.experts)} numbers for {manifest.layers} layers")
    for number in manifest.experts:
        _whole("experts", number, 0, EXPERTS_MAX)
    sparse = [number for number in manifest.experts if number]
    if not sparse:
        raise InvalidManifest("experts is 0 in every layer: a dense model, and shoal serves Mixture-of-Experts models")
    _whole("top_k", manifest.top_k, 1, min(sparse))


def _check_units(manifest: Manifest) -> None:
    count = 3 + manifest.layers + sum(manifest.experts)
    if count > MANIFEST_UNITS_MAX:
        raise InvalidManifest(f"a model of {count} units; at most {MANIFEST_UNITS_MAX} are allowed")
    names = [entry.name for entry in manifest.units]
    if names != _expected_names(manifest):
        raise InvalidManifest(
            f"units has {len(names)} entries; it must list exactly the {count} units of {manifest.layers} layers with"
            f" {manifest.experts} experts in their order: text, embed, trunk.0, expert.0.0, ..., head"
        )
    tensors = sum(len(entry.tensors) for entry in manifest.units)
    if tensors > MANIFEST_TENSORS_MAX:
        raise InvalidManifest(f"a model of {tensors} tensors; at most {MANIFEST_TENSORS_MAX} are allowed")


def _expected_names(manifest: Manifest) -> list[UnitName]:
    names = [units.TEXT, units.EMBED]
    for layer, experts in enumerate(manifest.experts):
        names.append(units.trunk(layer))
        names.extend(units.expert(layer, e) for e in range(experts))
    return [*names, units.HEAD]


def _check_unit(entry: UnitEntry) -> None:
    _spelled(f"{entry.name}: sha256", entry.sha256, _HASH, 64)
    _whole(f"{entry.name}: size", entry.size, 1, UNIT_BYTES_MAX)
    if entry.name == units.TEXT and entry.tensors:
        raise InvalidManifest("text: it must have no tensors")
    for tensor in entry.tensors:
        _check_tensor(entry.name, tensor)
    for before, after in pairwise(entry.tensors):
        if before.name >= after.name:
            raise InvalidManifest(f"{entry.name}: tensor {after.name} after {before.name}; names must ascend")


def _check_tensor(unit: UnitName, tensor: TensorEntry) -> None:
    _spelled(f"{unit}: a tensor's name", tensor.name, _TENSOR_NAME, TENSOR_NAME_CHARS_MAX)
    _one_of(f"{unit}: {tensor.name}: dtype", tensor.dtype, TENSOR_DTYPES)
    if len(tensor.shape) > TENSOR_RANK_MAX:
        raise InvalidManifest(f"{unit}: {tensor.name}: rank {len(tensor.shape)}; at most {TENSOR_RANK_MAX} is allowed")
    for dim in tensor.shape:
        _whole(f"{unit}: {tensor.name}: shape", dim, 0, TENSOR_DIM_MAX)
    if tensor.unit is not None:
        _spelled(f"{unit}: {tensor.name}: unit", tensor.unit, _NAME, NAME_CHARS_MAX)


def _check_references(manifest: Manifest) -> None:
    owned = {(e.name, t.name): (t.dtype, t.shape) for e in manifest.units for t in e.tensors if t.unit is None}
    for entry in manifest.units:
        for tensor in entry.tensors:
            if tensor.unit is not None and owned.get((tensor.unit, tensor.name)) != (tensor.dtype, tensor.shape):
                raise InvalidManifest(
                    f"{entry.name}: {tensor.name} refers to unit {tensor.unit!r}, which holds no such tensor of"
                    f" {tensor.dtype} {tensor.shape}"
                )


def _whole(what: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidManifest(f"{what} is {value!r:.80}; it must be a whole number from {low} to {high}")


def _one_of(what: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidManifest(f"{what} is {value!r:.80}; it must be one of {', '.join(allowed)}")


def _spelled(what: str, value: object, pattern: re.Pattern[str], chars_max: int) -> None:
    if not isinstance(value, str) or len(value) > chars_max or pattern.fullmatch(value) is None:
        raise InvalidManifest(
            f"{what} is {value!r:.80}; it must match {pattern.pattern} in at most {chars_max} characters"
        )
