"""Canonical unit bytes, and a reader that refuses every lie a header can tell."""

import contextlib
import json
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shard import unit_file
from shard.unit_file import DamagedFileError, chunks, mapped, read_header


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 32, generator=generator).bfloat16(),
        "bias": torch.randn(3, generator=generator),
        "gate": torch.randn(8, 16, generator=generator),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 5),
    }


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.write_bytes(b"".join(chunks(tensors)))
    return path


def raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_the_official_library_reads_our_files(tmp_path: Path) -> None:
    tensors = example()
    read = safetensors.torch.load_file(write(tmp_path / "u.safetensors", tensors))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_we_read_the_official_library_s_files(tmp_path: Path) -> None:
    safetensors.torch.save_file(example(), tmp_path / "u.safetensors", metadata={"format": "pt"})
    read = mapped(tmp_path / "u.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in example().items())


def test_the_order_in_which_tensors_come_changes_nothing() -> None:
    tensors = example()
    assert b"".join(chunks(tensors)) == b"".join(chunks(dict(reversed(tensors.items()))))


def test_a_strided_view_is_written_like_its_copy() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    assert b"".join(chunks({"t": tensor.T})) == b"".join(chunks({"t": tensor.T.contiguous()}))


def test_tensors_are_aligned_like_torch_s_own_memory_where_their_sizes_allow_it(tmp_path: Path) -> None:
    header = read_header(write(tmp_path / "u.safetensors", example()))
    assert min(placed.start for placed in header.values()) % 64 == 0
    assert {name: header[name].start % 64 for name in ("weight", "gate")} == {"weight": 0, "gate": 0}
    assert all(placed.start % placed.dtype.itemsize == 0 for placed in header.values())


def test_the_bytes_of_a_known_unit_never_change() -> None:
    data = b"".join(chunks({"b": torch.tensor([1.0, 2.0]), "a": torch.tensor([3, 4, 5], dtype=torch.uint8)}))
    text = (
        b'{"a":{"data_offsets":[8,11],"dtype":"U8","shape":[3]},"b":{"data_offsets":[0,8],"dtype":"F32","shape":[2]}}'
    )
    assert data == struct.pack("<Q", 120) + text.ljust(120) + struct.pack("<ff", 1, 2) + bytes([3, 4, 5])


def test_a_mapped_tensor_is_no_copy_and_writing_to_it_leaves_the_file_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "u.safetensors", example())
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensors = mapped(path)
        tensors["gate"].zero_()
    assert path.read_bytes() == before
    first = unit_file.read_header(path)
    assert tensors["weight"].data_ptr() - tensors["gate"].data_ptr() == first["weight"].start - first["gate"].start


BAD = {
    "an empty file": b"",
    "a header longer than the file": struct.pack("<Q", 50) + b"{}",
    "a header of absurd length": struct.pack("<Q", 2**63) + b"{}",
    "a header that is no JSON": struct.pack("<Q", 2) + b"{]",
    "a header that is no object": struct.pack("<Q", 2) + b"[]",
    "a header in broken UTF-8": struct.pack("<Q", 2) + b"\xff\xff",
    "a header that nests without end": struct.pack("<Q", 100_000) + b"[" * 100_000,
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_without_a_sound_header_is_refused(what: str, tmp_path: Path) -> None:
    path = tmp_path / "u.safetensors"
    path.write_bytes(BAD[what])
    with pytest.raises(DamagedFileError):
        read_header(path)


LIES: dict[str, tuple[Any, bytes]] = {
    "too little data": ({"t": entry()}, bytes(7)),
    "data after the last tensor": ({"t": entry()}, bytes(9)),
    "a hole between tensors": ({"t": entry(), "u": entry(offsets=(9, 17))}, bytes(17)),
    "tensors that overlap": ({"t": entry(), "u": entry(offsets=(4, 12))}, bytes(12)),
    "a shape that does not fit the bytes": ({"t": entry(shape=(3,))}, bytes(8)),
    "a shape whose product overflows": ({"t": entry(shape=(2**40, 2**40))}, bytes(8)),
    "a shape with a number beyond all machines": ({"t": entry(shape=(2**70,))}, bytes(8)),
    "a negative dimension": ({"t": entry(shape=(-2,))}, bytes(8)),
    "a dimension that is no integer": ({"t": entry(shape=(2.0,))}, bytes(8)),
    "a dimension that is true": ({"t": entry("U8", shape=(True,), offsets=(0, 1))}, bytes(1)),
    "offsets that run backwards": ({"t": entry(offsets=(8, 0))}, bytes(8)),
    "three offsets": ({"t": entry(offsets=(0, 8, 8))}, bytes(8)),
    "an unknown dtype": ({"t": entry("F5")}, bytes(8)),
    "a dtype that is no text": ({"t": entry([])}, bytes(8)),  # type: ignore[arg-type]
    "too many dimensions": ({"t": entry(shape=(2, 1, 1, 1, 1, 1, 1, 1, 1))}, bytes(8)),
    "an entry that is no object": ({"t": 5}, b""),
    "an entry with a missing field": ({"t": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "one name twice": (
        b'{"t":' + json.dumps(entry()).encode() + b',"t":' + json.dumps(entry()).encode() + b"}",
        bytes(8),
    ),
}


@pytest.mark.parametrize("what", LIES)
def test_a_header_that_lies_is_refused(what: str, tmp_path: Path) -> None:
    header, data = LIES[what]
    with pytest.raises(DamagedFileError):
        read_header(raw(tmp_path / "u.safetensors", header, data))


def test_a_tensor_has_so_many_dimensions_at_most(tmp_path: Path) -> None:
    shape = (2,) + (1,) * (unit_file.RANK_MAX - 1)
    assert read_header(raw(tmp_path / "a.safetensors", {"t": entry(shape=shape)}, bytes(8)))["t"].shape == shape
    with pytest.raises(DamagedFileError, match=f"at most {unit_file.RANK_MAX}"):
        read_header(raw(tmp_path / "b.safetensors", {"t": entry(shape=(*shape, 1))}, bytes(8)))


def test_a_header_above_the_limit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_file, "HEADER_BYTES_MAX", 100)
    path = raw(tmp_path / "u.safetensors", b"{}".ljust(101))
    with pytest.raises(DamagedFileError, match="limit of 100"):
        read_header(path)
    assert read_header(raw(path, b"{}".ljust(100))) == {}


def test_a_tensor_that_does_not_suit_its_dtype_s_alignment_is_refused(tmp_path: Path) -> None:
    header = {"a": entry("U8", (1,), (0, 1)), "b": entry("F32", (2,), (1, 9))}
    with pytest.raises(DamagedFileError, match="does not suit"):
        mapped(raw(tmp_path / "u.safetensors", header, bytes(9)))


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 400), byte=st.integers(0, 255), cut=st.integers(0, 600))
def test_no_damage_makes_the_reader_fail_otherwise(position: int, byte: int, cut: int, tmp_path_factory: Any) -> None:
    data = bytearray(b"".join(chunks(example())))
    data[position] = byte
    path = tmp_path_factory.mktemp("fuzz") / "u.safetensors"
    path.write_bytes(data[: len(data) - cut] if cut < len(data) else b"")
    with contextlib.suppress(DamagedFileError):
        read_header(path)
