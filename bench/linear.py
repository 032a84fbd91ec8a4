"""Kernels that multiply a few rows by a weight, microseconds a call: what shard.linear chooses between.

python -m bench.linear [--rounds 5] [--threads 1]

How to read it.  x [rows, K] times the transpose of a weight [N, K].  Calls go round copies of the weight that together
exceed the caches, as the layers of a model do, so at few rows what is measured is how fast a kernel reads weights
(`GB/s`, of the best).  `linear` is torch.nn.functional.linear; `bmm` is MKL's batched kernel; `onednn` is
torch.ops.mkldnn._linear_pointwise on the weight as it is; `packed` is the same on a copy of the weight in the layout
that oneDNN prefers; `shard` is shard.linear, which should be the least of those that it knows.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from bench.rounds import conditions, interleaved, median, table
from shard.linear import linear

if TYPE_CHECKING:
    from collections.abc import Callable

    Kernel = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ROWS = (1, 2, 4, 8, 32, 256)
SHAPES = ((512, 512), (512, 2048), (1024, 512), (512, 8192), (576, 96), (48, 576))  # K, N
COPIES_BYTES = 150_000_000
COPIES_MAX = 300
COPIES_MIN = 3


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    rows = []
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            for width, columns in SHAPES:
                rows += _measure(width, columns, dtype, arguments.rounds)
    print(table(("", "linear", "bmm", "onednn", "packed", "shard", "best, GB/s"), rows))
    print(f"\nMicroseconds a call, medians of {arguments.rounds} interleaved rounds. {conditions(arguments.threads)}.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _measure(width: int, columns: int, dtype: torch.dtype, rounds: int) -> list[list[str]]:
    generator = torch.Generator().manual_seed(0)
    size = width * columns * dtype.itemsize
    count = max(COPIES_MIN, min(COPIES_MAX, COPIES_BYTES // size))
    weights = [torch.randn(columns, width, generator=generator).to(dtype) for _ in range(count)]
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    found = []
    for rows in ROWS:
        x = torch.randn(rows, width, generator=generator).to(dtype)
        ways = {
            "linear": partial(_microseconds, functional.linear, x, weights),
            "bmm": partial(_microseconds, _batched, x, weights),
            "onednn": partial(_microseconds, _onednn, x, weights),
            "packed": partial(_microseconds, _onednn, x, packed),
            "shard": partial(_microseconds, linear, x, weights),
        }
        medians = {name: median(times) for name, times in interleaved(ways, rounds).items()}
        label = f"{str(dtype).removeprefix('torch.')}, K {width}, N {columns}, {rows} row{'s' * (rows != 1)}"
        speed = size / min(medians.values()) / 1e3
        found.append([label, *(f"{time_us:.0f}" for time_us in medians.values()), f"{speed:.0f}"])
    return found


def _batched(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.bmm(weight.unsqueeze(0), x.unsqueeze(0).transpose(1, 2))[0].t().contiguous()


def _onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def _microseconds(kernel: Kernel, x: torch.Tensor, weights: list[torch.Tensor]) -> float:
    started = time.perf_counter()
    for weight in weights:
        kernel(x, weight)
    return 1e6 * (time.perf_counter() - started) / len(weights)


if __name__ == "__main__":
    main()
