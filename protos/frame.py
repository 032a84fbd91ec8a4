"""The tensor frame: dtype, shape and little-endian values of one tensor, as bytes.

Pure: bytes in, bytes out, nothing copied on reading. Everything in the header is checked before a caller could allocate
by it. The byte table and a golden frame are in PROTOCOL.md, section 5.
"""

import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from protos.errors import BrokenInvariant, FrameTooLarge, InvalidFrame
from protos.limits import FRAME_BYTES_MAX, FRAME_RANK_MAX

Buffer: TypeAlias = bytes | bytearray | memoryview

ITEM_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
"""The dtypes that cross the wire, and the size of one value."""

_CODES: Final = {"float32": 1, "bfloat16": 2, "float16": 3, "int64": 4}
_DTYPES: Final = {code: dtype for dtype, code in _CODES.items()}
_MAGIC: Final = b"SHTF"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<4sBBBBQ")  # magic, version, dtype, rank, reserved 0, payload bytes; then rank * u64
_DIM_BYTES: Final = 8
_DIM_LIMIT: Final = 1 << 64

if sys.byteorder != "little":
    raise BrokenInvariant("frames carry this machine's memory as it is, and only little-endian machines agree on it")


@dataclass(frozen=True, slots=True)
class Frame:
    """A decoded tensor. `data` is a read-only view into the buffer that was decoded, so it keeps that buffer alive."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview


def encode(dtype: str, shape: Sequence[int], data: Buffer) -> bytes:
    """The frame of a contiguous tensor. Raises BrokenInvariant: only our own code calls this."""
    code = _CODES.get(dtype)
    if code is None:
        raise BrokenInvariant(f"a frame of {dtype}: only {', '.join(_CODES)} are sent")
    if len(shape) > FRAME_RANK_MAX or not all(0 <= dim < _DIM_LIMIT for dim in shape):
        raise BrokenInvariant(
            f"a frame of shape {tuple(shape)}: at most {FRAME_RANK_MAX} dimensions of 64 bits are sent"
        )
    size = memoryview(data).nbytes
    if size != math.prod(shape) * ITEM_BYTES[dtype]:
        raise BrokenInvariant(f"a frame of {dtype} {tuple(shape)} from {size} bytes of data")
    if _HEADER.size + len(shape) * _DIM_BYTES + size > FRAME_BYTES_MAX:
        raise BrokenInvariant(f"a frame of {dtype} {tuple(shape)}: above {FRAME_BYTES_MAX} bytes; split it by rows")
    header = _HEADER.pack(_MAGIC, _VERSION, code, len(shape), 0, size)
    return b"".join((header, struct.pack(f"<{len(shape)}Q", *shape), data))


def decode(buf: Buffer, *, bytes_max: int, rank_max: int = FRAME_RANK_MAX) -> Frame:
    """The tensor in `buf`, which must be one frame and nothing else.

    bytes_max: of the whole frame. Raises FrameTooLarge if `buf`, or what its shape announces, is larger; InvalidFrame.
    """
    view = memoryview(buf).cast("B").toreadonly()
    if view.nbytes > bytes_max:
        raise FrameTooLarge(f"a frame of {view.nbytes} bytes; at most {bytes_max} are accepted here")
    dtype, rank, size = _header(view, rank_max)
    start = _HEADER.size + rank * _DIM_BYTES
    if view.nbytes < start:
        raise InvalidFrame(f"a frame of {view.nbytes} bytes ends inside its header of {start}")
    shape: tuple[int, ...] = struct.unpack_from(f"<{rank}Q", view, _HEADER.size)
    _check_size(dtype, shape, size, bytes_max)
    if view.nbytes - start != size:
        raise InvalidFrame(f"a frame announces {size} bytes of data and carries {view.nbytes - start}")
    return Frame(dtype, shape, view[start:])


def _header(view: memoryview, rank_max: int) -> tuple[str, int, int]:
    if view.nbytes < _HEADER.size:
        raise InvalidFrame(f"{view.nbytes} bytes are no frame: its header alone has {_HEADER.size}")
    magic, version, code, rank, reserved, size = _HEADER.unpack_from(view)
    if magic != _MAGIC or version != _VERSION or reserved != 0:
        raise InvalidFrame(f"no frame of version {_VERSION}: it begins with {bytes(view[:8]).hex()}")
    if code not in _DTYPES:
        raise InvalidFrame(f"a frame of unknown dtype {code}; known are {_DTYPES}")
    if rank > rank_max:
        raise InvalidFrame(f"a frame of rank {rank}; at most {rank_max} is accepted here")
    return _DTYPES[code], rank, size


def _check_size(dtype: str, shape: tuple[int, ...], size: int, bytes_max: int) -> None:
    # A dimension of 0 must not hide an absurd one beside it: strides are computed from all of them.
    if math.prod(max(dim, 1) for dim in shape) * ITEM_BYTES[dtype] > bytes_max or size > bytes_max:
        raise FrameTooLarge(f"a frame announces {dtype} {shape} in {size} bytes; at most {bytes_max} are accepted here")
    if math.prod(shape) * ITEM_BYTES[dtype] != size:
        raise InvalidFrame(f"a frame announces {dtype} {shape} in {size} bytes: the two disagree")
