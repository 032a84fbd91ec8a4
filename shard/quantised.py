"""Two quantised formats, undone as they are read: block-scaled FP8 (DeepSeek) and MXFP4 (GPT-OSS).

Law: a quantised tensor appears as an ordinary one under the weight's name; what cannot be undone exactly is refused by
name.  The values are those that transformers' own dequantisation gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from protos.errors import UnsupportedModel
from shard.stored import Source, Stored

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """An FP8 weight [R, C] with one scale per block, as DeepSeek publishes it: value = fp8 * scale of its block.

    The last block of a row or column may be cut (DeepSeek-V3's kv_a_proj_with_mqa has 4.5 blocks of rows).
    """

    weight: Stored
    scale: Stored
    block: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """[R, C] in `dtype`, one strip of blocks after the other: float32 is only ever held for one strip."""
        rows, columns = self.shape
        weight, scale = self.weight.raw(), self.scale.raw().to(torch.float32)
        values = torch.empty((rows, columns), dtype=dtype)
        for index, strip in enumerate(torch.split(weight, self.block[0])):
            factors = scale[index].repeat_interleave(self.block[1])[:columns]
            values[index * self.block[0] :][: len(strip)] = strip.to(torch.float32) * factors
        return values


@dataclass(frozen=True, slots=True)
class Microscaled:
    """Experts in MXFP4, as GPT-OSS publishes them: blocks [E, R, G, 16] (two values a byte), scales [E, R, G]."""

    blocks: Stored
    scales: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, half = self.blocks.shape
        return (experts, groups * half * 2, rows)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """[E, 32 G, R] in `dtype`, one expert after the other, since transformers' function takes much room beside."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        blocks, scales = self.blocks.raw(), self.scales.raw()
        values = torch.empty(self.shape, dtype=dtype)
        for expert in range(len(values)):
            one = slice(expert, expert + 1)
            values[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=dtype)
        return values


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The name of the checkpoint's quantisation, if it is one that can be undone exactly."""
    settings = config.get("quantization_config")
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method not in ("fp8", "mxfp4"):
        raise UnsupportedModel(
            f"the checkpoint is quantised with {method!r}; block-scaled FP8 and MXFP4 can be read, or one that is not"
            " quantised"
        )
    return cast("str", method)


def block_scaled(stored: Mapping[str, Stored], settings: Mapping[str, Any]) -> dict[str, Source]:
    block = settings.get("weight_block_size")
    sizes = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
    if not sizes or settings.get("activation_scheme", "dynamic") != "dynamic":
        raise UnsupportedModel(
            "the checkpoint's FP8 needs weight_block_size [rows, columns] and a dynamic activation_scheme; it has"
            f" {block!r:.40} and {settings.get('activation_scheme')!r:.40}"
        )
    sources: dict[str, Source] = dict(stored)
    for name, weight in stored.items():
        if weight.dtype == torch.float8_e4m3fn:
            scale = sources.pop(f"{name}_scale_inv", None)
            sources[name] = _check_block_scaled(weight, scale, cast("list[int]", block))
    return sources


def _check_block_scaled(weight: Stored, scale: Source | None, block: list[int]) -> BlockScaled:
    if not isinstance(scale, Stored):
        raise UnsupportedModel(f"FP8 tensor {weight.name} has no {weight.name}_scale_inv")
    grid = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=False))
    floats = scale.dtype.is_floating_point and scale.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2)
    if len(weight.shape) != 2 or scale.shape != grid or not floats:
        raise UnsupportedModel(
            f"FP8 tensor {weight.name} {weight.shape} in blocks of {block} needs floating-point scales of shape"
            f" {grid}; {scale.name} is {scale.dtype} {scale.shape}"
        )
    return BlockScaled(weight, scale, (block[0], block[1]))


def microscaled(stored: Mapping[str, Stored]) -> dict[str, Source]:
    sources: dict[str, Source] = dict(stored)
    for name in stored:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            blocks, scales = sources.pop(name), sources.pop(f"{stem}_scales", None)
            sources[stem] = _check_microscaled(stem, blocks, scales)
    return sources


def _check_microscaled(stem: str, blocks: Source, scales: Source | None) -> Microscaled:
    if not isinstance(blocks, Stored) or not isinstance(scales, Stored):
        raise UnsupportedModel(f"MXFP4 tensor {stem}_blocks has no {stem}_scales")
    octets = blocks.dtype == scales.dtype == torch.uint8
    if not octets or len(blocks.shape) != 4 or blocks.shape[:-1] != scales.shape or blocks.shape[-1] != 16:
        raise UnsupportedModel(
            f"MXFP4 tensor {stem} needs bytes: blocks [E, R, G, 16] and scales [E, R, G]; it has {blocks.dtype}"
            f" {blocks.shape} and {scales.dtype} {scales.shape}"
        )
    return Microscaled(blocks, scales)
