"""Rows between torch and the wire: a tensor [n, H] as a frame, and back.

Law: dtype and shape are checked before anything is allocated; what comes from another node must be finite.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from protos import frame
from protos.errors import InvalidFrame, NonFinite
from protos.limits import FRAME_BYTES_MAX, FRAME_HEADER_BYTES_MAX, STEP_ROWS_MAX

if TYPE_CHECKING:
    from protos.manifest import Manifest

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


def encode(rows: torch.Tensor) -> bytes:
    """The frame of rows [n, H], from whatever device."""
    there = rows.detach().cpu().contiguous()
    data = there.view(torch.uint8).numpy()
    return frame.encode(_NAMES[there.dtype], tuple(there.shape), data.data)


def decode(data: bytes, manifest: Manifest, count: int) -> torch.Tensor:
    """`count` rows of the manifest's model, on the CPU.  Raises InvalidFrame or NonFinite."""
    found = frame.decode(data, bytes_max=FRAME_BYTES_MAX, rank_max=2)
    expected = (manifest.dtype, (count, manifest.hidden))
    if (found.dtype, found.shape) != expected:
        raise InvalidFrame(f"rows are {found.dtype} {found.shape}; expected {expected[0]} {expected[1]}")
    rows = torch.frombuffer(bytearray(found.data), dtype=DTYPES[found.dtype]).view(found.shape)
    if not bool(torch.isfinite(rows).all()):
        raise NonFinite(f"{count} rows hold NaN or infinity")
    return rows


def count_max(manifest: Manifest) -> int:
    """Rows of this model that fit one step's frame."""
    row_bytes = manifest.hidden * frame.ITEM_BYTES[manifest.dtype]
    return min(STEP_ROWS_MAX, (FRAME_BYTES_MAX - FRAME_HEADER_BYTES_MAX) // row_bytes)
