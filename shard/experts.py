"""The experts seam, and the experts that this process holds.  Registered with transformers as "shoal".

A reply is one row per (row, expert), unweighted, in the checkpoint's dtype; the stage weights and sums. All rows of
one expert are multiplied in one call, so the answer does not depend on who else holds what. The sum follows
transformers' `grouped_mm`, the oracle of the exactness law.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from protos import units
from protos.errors import UnitMissing
from shard.linear import linear

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Experts(Protocol):
    """The port between a stage and whoever holds its experts."""

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Expert `index[t, k]` of `hidden[t]`: hidden [T, H], index [T, K] int64; returns [T, K, H], unweighted."""
        ...


def experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """transformers' experts interface: hidden [T, H], index, weights [T, K] to [T, H], summed as by `grouped_mm`."""
    rows = module.shoal_experts(module.shoal_layer, hidden, index)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    out: torch.Tensor = (rows * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
    return out


class ExpertBank:
    """The experts held here, by layer.  Pure functions of (unit, rows)."""

    def __init__(self) -> None:
        self._kernels: dict[int, Any] = {}
        self._held: dict[tuple[int, int], Mapping[str, torch.Tensor]] = {}

    def add_layer(self, layer: int, module: Any) -> None:
        """Takes the layer's experts module for its gate, activation and layout; its own weights are not read."""
        self._kernels[layer] = module

    def add(self, layer: int, expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes one expert's weights, in the layout of the layer's module without its first axis."""
        self._held[layer, expert] = tensors

    def holds(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._held

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The port, when all experts are here: see Experts."""
        count = index.shape[1]
        out = self.rows(layer, hidden, [flat // count for flat in range(index.numel())], index.flatten().tolist())
        return out.view(index.shape[0], count, -1)

    def rows(self, layer: int, hidden: torch.Tensor, row: Sequence[int], expert: Sequence[int]) -> torch.Tensor:
        """Pair p is expert `expert[p]` applied to `hidden[row[p]]`: hidden [T, H]; returns [len(row), H].

        Raises UnitMissing for an expert that is not held.
        """
        groups: dict[int, list[int]] = {}
        for pair, chosen in enumerate(expert):
            groups.setdefault(chosen, []).append(pair)
        order = [pair for pairs in groups.values() for pair in pairs]
        out = _pick(hidden, [row[pair] for pair in order])
        kernel = self._kernel(layer)
        for chosen, part in zip(groups, out.split_with_sizes([len(pairs) for pairs in groups.values()]), strict=True):
            part.copy_(feed_forward(kernel, self._weights(layer, chosen), part))
        if len(groups) == len(order):  # every pair has an expert of its own, and they are in order already
            return out
        return _pick(out, sorted(range(len(order)), key=order.__getitem__))

    def _kernel(self, layer: int) -> Any:
        try:
            return self._kernels[layer]
        except KeyError:
            raise UnitMissing(f"no expert of layer {layer} is held here") from None

    def _weights(self, layer: int, expert: int) -> Mapping[str, torch.Tensor]:
        try:
            return self._held[layer, expert]
        except KeyError:
            raise UnitMissing(f"{units.expert(layer, expert)} is not held here") from None


def feed_forward(kernel: Any, weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """One expert over its rows, [n, H] to [n, H], as the module's `grouped_mm` path computes it."""
    first = "gate_up_proj" if kernel.has_gate else "up_proj"
    projected = _linear(kernel, weights, first, hidden)
    activated = kernel._apply_gate(projected) if kernel.has_gate else kernel.act_fn(projected)
    return _linear(kernel, weights, "down_proj", activated)


def _linear(kernel: Any, weights: Mapping[str, torch.Tensor], name: str, hidden: torch.Tensor) -> torch.Tensor:
    weight = weights[name]
    out = torch.mm(hidden, weight) if kernel.is_transposed else linear(hidden, weight)
    return out.add_(weights[name + "_bias"]) if kernel.has_bias else out


def _pick(rows: torch.Tensor, index: list[int]) -> torch.Tensor:
    return rows.index_select(0, torch.tensor(index, dtype=torch.long, device=rows.device))


ALL_EXPERTS_FUNCTIONS.register("shoal", experts)
