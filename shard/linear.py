"""x @ W.T (+ b): the multiplication that takes nearly all of the time, by the fastest kernel that this torch has.

torch multiplies float32 on a CPU with MKL's matrix kernels, which at few rows read weights far slower than memory
gives them (AMD EPYC 9005, one thread, weights beyond the cache; bench/linear.py). Two others read the same weights in
less time: oneDNN, which torch carries for bfloat16 (0.6 of the time at one row, 0.35 at 256), and at two to four
short rows MKL's batched kernel (0.45). The sums differ in the last bits only. In bfloat16 torch itself takes oneDNN,
and what comes out is transformers' to the bit.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import nn

ONEDNN_BYTES_MIN = 256 * 1024  # below, its cost of 10 us a call is not won back at the few rows of a decode step
ONEDNN_ROWS_MIN = 32  # from here on it wins at every size
BATCHED_ROWS = range(2, 5)
BATCHED_WIDTH_MAX = 1024  # longer rows fall out of the first cache, and oneDNN wins again


# The operator is torch's own, but not a documented one: asked, not assumed.
_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K], weight [N, K], bias [N]; returns [..., N]."""
    if _ONEDNN and weight.dtype == torch.float32 and weight.device.type == "cpu":
        width = x.shape[-1]
        rows = x.numel() // width
        if rows in BATCHED_ROWS and width <= BATCHED_WIDTH_MAX and bias is None:
            columns = torch.bmm(weight.unsqueeze(0), x.reshape(1, rows, width).transpose(1, 2))
            return columns[0].t().contiguous().view(*x.shape[:-1], -1)  # the next multiplication is slow on columns
        if rows and (weight.nbytes >= ONEDNN_BYTES_MIN or rows >= ONEDNN_ROWS_MIN):
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
            return out
    return functional.linear(x, weight, bias)


def speed_up(model: nn.Module) -> None:
    """Sends all of a model's Linear layers through `linear`."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)
