"""A tensor of a checkpoint that is not in memory yet: what it will be, and how to get it.

Law: read with pread into memory of its own, since the pages of a mapping would count as this process's memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, cast

import torch

from protos.errors import UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

    from shard.unit_file import Placed

READ_BYTES: Final = 64 * 1024 * 1024
"""One system call: Linux reads at most 2 GiB at once."""


class Source(Protocol):
    """A tensor that the checkpoint can give: what it will be, and how to get it."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self, dtype: torch.dtype) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file."""

    path: Path
    name: str
    placed: Placed

    @property
    def shape(self) -> tuple[int, ...]:
        return self.placed.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.placed.dtype

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        return self.raw().to(dtype)

    def raw(self) -> torch.Tensor:
        """The tensor in the file's own dtype."""
        octets = torch.empty(self.placed.stop - self.placed.start, dtype=torch.uint8)
        self.read_into(memoryview(cast("Buffer", octets.numpy())))
        return octets.view(self.placed.dtype).reshape(self.placed.shape)

    def read_into(self, buffer: memoryview, skip: int = 0) -> None:
        """Fills `buffer` with the tensor's bytes from `skip` on.  Raises UnsupportedModel if the file ends before."""
        begin = self.placed.start + skip
        file = os.open(self.path, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(file, [buffer[done : done + READ_BYTES]], begin + done)
                if count == 0:
                    raise UnsupportedModel(f"{self.path}: it ends inside tensor {self.name}; get the file again")
                done += count
        finally:
            os.close(file)


def same(one: Stored, other: Stored) -> bool:
    """True if both have the same dtype, shape and bytes; compared piece by piece."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    size = one.placed.stop - one.placed.start
    return all(_piece(one, start, size) == _piece(other, start, size) for start in range(0, size, READ_BYTES))


def _piece(stored: Stored, start: int, size: int) -> bytearray:
    buffer = bytearray(min(READ_BYTES, size - start))
    stored.read_into(memoryview(buffer), start)
    return buffer
