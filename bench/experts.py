"""Ways to compute one MoE layer's experts: transformers' experts functions and shard.experts, microseconds a call.

python -m bench.experts [--rounds 5] [--threads 1]

How to read it.  Each way gets the same rows with the same routing through the same seam (hidden rows, chosen experts
and their weights in, weighted sums out), on a Mixtral-shaped layer (8 large experts, top-2) and on a fine-grained one
(16 tiny experts, top-4).  Calls go round copies of the layer that together exceed the caches, as the layers of a model
do.  Medians of interleaved rounds; the ratio is transformers' fastest over ours: above 1, shoal is faster.  batched_mm
copies the weights for each pair of row and expert; where that exceeds 256 MiB it is left out.
"""

from __future__ import annotations

import argparse
import itertools
import time
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import MixtralConfig, Qwen2MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeExperts

from bench.rounds import conditions, interleaved, median, table
from shard.experts import ExpertBank

if TYPE_CHECKING:
    from collections.abc import Callable

THEIRS = ("eager", "grouped_mm", "batched_mm")
OURS = "shoal"
ROWS = (1, 8, 64, 256)
DTYPES = (torch.float32, torch.bfloat16)
COPIES_BYTES = 150_000_000
BATCHED_BYTES_MAX = 256 << 20
TURN_S_MIN = 0.05  # a way's turn in a round


class Shape(NamedTuple):
    name: str
    make: Callable[[], Any]
    hidden: int
    ffn: int
    experts: int
    top_k: int

    @property
    def values(self) -> int:
        return 3 * self.hidden * self.ffn


def _mixtral() -> Any:
    return MixtralExperts(MixtralConfig(hidden_size=512, intermediate_size=1024, num_local_experts=8))


def _fine_grained() -> Any:
    return Qwen2MoeExperts(Qwen2MoeConfig(hidden_size=576, moe_intermediate_size=48, num_experts=16))


SHAPES = (
    Shape("Mixtral", _mixtral, 512, 1024, experts=8, top_k=2),
    Shape("fine-grained", _fine_grained, 576, 48, experts=16, top_k=4),
)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    rows = []
    with torch.inference_mode():
        for shape in SHAPES:
            for dtype in DTYPES:
                layers = _layers(shape, dtype)
                rows += [_measure(shape, dtype, layers, count, arguments.rounds) for count in ROWS]
    print(table(("", *THEIRS, OURS, "fastest of theirs / ours", "rows equal to grouped_mm's"), rows))
    print(f"\nMicroseconds a call, medians of {arguments.rounds} interleaved rounds. {conditions(arguments.threads)}.")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def _layers(shape: Shape, dtype: torch.dtype) -> list[Any]:
    """Copies of the layer with weights of their own, each with a bank that holds its experts."""
    generator = torch.Generator().manual_seed(0)
    count = -(-COPIES_BYTES // (shape.experts * shape.values * dtype.itemsize))
    layers = []
    for number in range(count):
        layer = shape.make().to(dtype)
        for weight in layer.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
        bank = ExpertBank()
        bank.add_layer(number, layer)
        for expert in range(shape.experts):
            bank.add(number, expert, {name: weight[expert] for name, weight in layer.named_parameters()})
        layer.shoal_layer, layer.shoal_experts = number, bank
        layers.append(layer)
    return layers


def _measure(shape: Shape, dtype: torch.dtype, layers: list[Any], count: int, rounds: int) -> list[str]:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, shape.hidden, generator=generator).to(dtype)
    routing = torch.rand(count, shape.experts, generator=generator).topk(shape.top_k)
    inputs = (hidden, routing.indices, routing.values.to(dtype))
    batched_bytes = count * shape.top_k * shape.values * dtype.itemsize
    names = [name for name in (*THEIRS, OURS) if name != "batched_mm" or batched_bytes <= BATCHED_BYTES_MAX]
    ways = {name: partial(_microseconds, name, layers, inputs) for name in names}
    interleaved(ways, 1)
    medians = {name: median(found) for name, found in interleaved(ways, rounds).items()}
    ratio = min(medians[name] for name in names if name in THEIRS) / medians[OURS]
    times = [f"{medians[name]:.0f}" if name in medians else "" for name in (*THEIRS, OURS)]
    same = (_call("grouped_mm", layers[0], inputs) == _call(OURS, layers[0], inputs)).all(dim=-1).sum()
    label = f"{shape.name}, {str(dtype).removeprefix('torch.')}, {count} row{'s' * (count != 1)}"
    return [label, *times, f"{ratio:.2f}", f"{int(same)} of {count}"]


def _call(name: str, layer: Any, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    layer.config._experts_implementation = name
    out: torch.Tensor = layer(*inputs)
    return out


def _microseconds(name: str, layers: list[Any], inputs: tuple[torch.Tensor, ...]) -> float:
    for layer in layers:
        layer.config._experts_implementation = name
    calls, started = 0, time.perf_counter()
    for layer in itertools.cycle(layers):
        layer(*inputs)
        calls += 1
        if (spent := time.perf_counter() - started) > TURN_S_MIN:
            break
    return 1e6 * spent / calls


if __name__ == "__main__":
    main()
