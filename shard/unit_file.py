"""The bytes of a unit: a safetensors file in one canonical form, and a reader of that format that trusts nothing.

Law: equal tensors give equal bytes, whoever packs; and no number in a file is believed, or memory taken for it, before
it has been checked against the file's length.
The format: 8 bytes little-endian header length, a JSON header, tensors without holes
(https://huggingface.co/docs/safetensors).  Canonical: no metadata; JSON with sorted keys, no spaces, ASCII; padded with
spaces so that the data begins at a multiple of 64 bytes; first the tensors whose size is a multiple of 64, so that each
of them is aligned like memory that torch allocates; within both groups by descending element size, then name.
"""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final, cast

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from typing_extensions import Buffer

HEADER_BYTES_MAX: Final = 100_000_000
"""The official parser's limit."""

RANK_MAX: Final = 8
ALIGNMENT_BYTES: Final = 64

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
CODES: Final = {dtype: code for code, dtype in DTYPES.items()}


class DamagedFileError(ValueError):
    """A file that breaks the format's rules; the caller knows whose file it is and says so."""


@dataclass(frozen=True, slots=True)
class Placed:
    """A tensor and where its bytes are, counted from the file's first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> dict[str, Placed]:
    """The tensors of a safetensors file, by name.  Raises DamagedFileError; OSError if it cannot be read at all."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DamagedFileError(
                f"it has {size} bytes, too few for a header of {length} bytes: truncated, or no safetensors"
            )
        if length > HEADER_BYTES_MAX:
            raise DamagedFileError(f"its header of {length} bytes is above the limit of {HEADER_BYTES_MAX}")
        header = file.read(length)
    if len(header) != length:
        raise DamagedFileError("it was truncated while it was read")
    return _parse(header, 8 + length, size)


def chunks(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The canonical file of `tensors` (on the CPU), piece by piece; the data pieces share the tensors' memory."""
    names = sorted(tensors, key=lambda name: _place(name, tensors[name]))
    header: dict[str, Any] = {}
    stop = 0
    for name in names:
        start, stop = stop, stop + tensors[name].nbytes
        shape = list(tensors[name].shape)
        header[name] = {"data_offsets": [start, stop], "dtype": CODES[tensors[name].dtype], "shape": shape}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-(8 + len(text)) % ALIGNMENT_BYTES)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for name in names:
        yield _bytes_of(tensors[name])


def mapped(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file as views of its mapping: no copy, pages read on first use.

    The mapping is private: writing to a tensor never reaches the file.  Raises DamagedFileError, OSError.
    """
    header = read_header(path)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {name: _view(mapping, name, placed) for name, placed in header.items()}


def _place(name: str, tensor: torch.Tensor) -> tuple[bool, int, str]:
    return (tensor.nbytes % ALIGNMENT_BYTES != 0, -tensor.element_size(), name)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return memoryview(cast("Buffer", octets.numpy()))


def _view(mapping: mmap.mmap, name: str, placed: Placed) -> torch.Tensor:
    if placed.stop == placed.start:
        return torch.empty(placed.shape, dtype=placed.dtype)
    if placed.start % placed.dtype.itemsize:
        raise DamagedFileError(f"tensor {name!r} begins at byte {placed.start}, which does not suit {placed.dtype}")
    count = (placed.stop - placed.start) // placed.dtype.itemsize
    return torch.frombuffer(mapping, dtype=placed.dtype, count=count, offset=placed.start).reshape(placed.shape)


def _parse(header: bytes, data_start: int, size: int) -> dict[str, Placed]:
    try:
        document = json.loads(header.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"its header is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise DamagedFileError("its header is no JSON object")
    document.pop("__metadata__", None)
    found = {name: _parse_tensor(name, entry, data_start) for name, entry in document.items()}
    stop = data_start
    for name, placed in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if placed.start != stop:
            raise DamagedFileError(
                f"tensor {name!r} begins at byte {placed.start}, but the one before it ends at {stop}"
            )
        stop = placed.stop
    if stop != size:
        raise DamagedFileError(
            f"it has {size} bytes, but its tensors end at {stop}: truncated, or with data at its end"
        )
    return found


def _parse_tensor(name: str, entry: object, data_start: int) -> Placed:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise DamagedFileError(f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise DamagedFileError(f"tensor {name!r} has dtype {entry['dtype']!r:.40}; known are {', '.join(DTYPES)}")
    shape = _naturals(name, "shape", entry["shape"])
    offsets = _naturals(name, "data_offsets", entry["data_offsets"])
    if len(shape) > RANK_MAX:
        raise DamagedFileError(f"tensor {name!r} has {len(shape)} dimensions; at most {RANK_MAX} are allowed")
    if len(offsets) != 2 or offsets[1] - offsets[0] != prod(shape) * dtype.itemsize:
        raise DamagedFileError(f"tensor {name!r}: data_offsets {offsets!r:.80} do not fit {entry['dtype']} {shape}")
    return Placed(dtype, shape, data_start + offsets[0], data_start + offsets[1])


def _naturals(name: str, field: str, value: object) -> tuple[int, ...]:
    whole = isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 60 for number in value)
    if not whole:
        raise DamagedFileError(f"tensor {name!r}: {field} {value!r:.80} is no list of whole numbers")
    return tuple(value)  # type: ignore[arg-type]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name appears twice")
    return made
