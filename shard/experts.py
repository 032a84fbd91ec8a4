"""The experts seam, and the experts that this process holds.  Registered with transformers as "shoal".

A reply is one row per (row, expert), unweighted, in the checkpoint's dtype; the stage weights and sums. All rows of
one expert are multiplied in one call, so the answer does not depend on who else holds what. The sum follows
transformers' `grouped_mm`, the oracle of the exactness law.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from protos import units
from protos.errors import ExpertsUnreachable, UnitMissing
from shard.linear import linear

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Numbers: TypeAlias = npt.NDArray[np.int64]


class RowsLost(Exception):  # noqa: N818  (its name says what it carries; the forward that it leaves is not at fault)
    """Rows of a forward whose experts nobody computed, each with the reason.  The other rows can run without them."""

    def __init__(self, rows: Mapping[int, ExpertsUnreachable]) -> None:
        super().__init__(f"{len(rows)} rows have no answer from their experts")
        self.rows = rows


class Experts(Protocol):
    """The port between a stage and whoever holds its experts."""

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Expert `index[t, k]` of `hidden[t]`: hidden [T, H], index [T, K] int64; returns [T, K, H], unweighted.

        Raises RowsLost.
        """
        ...


def experts(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """transformers' experts interface: hidden [T, H], index, weights [T, K] to [T, H], summed as by `grouped_mm`."""
    rows = module.shoal_experts(module.shoal_layer, hidden, index)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    out: torch.Tensor = (rows * weights.unsqueeze(-1)).sum(dim=1).to(hidden.dtype)
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one holder computes of a layer: pairs (row, expert), all of an expert side by side."""

    experts: Sequence[int]
    counts: Sequence[int]  # pairs of each of them
    pairs: Numbers  # [n]: their numbers in the whole, which is where the replies belong
    rows: Numbers  # [n]: the row of each


class Pairs:
    """Every pair (row, expert) of one layer: shared out among whoever holds the experts, and put together again.

    Law: all rows of one expert stay together and in order, so that its product is the same however the rest is shared.
    """

    def __init__(self, index: torch.Tensor) -> None:
        """index [T, K] int64: pair t * K + k is expert `index[t, k]` of row t."""
        self.shape = tuple(index.shape)
        chosen = index.flatten().cpu().numpy()
        ones: list[int] = chosen.tolist() if self.shape[0] == 1 else []
        self._in_order = bool(ones) and len(set(ones)) == len(ones)  # decoding alone
        if self._in_order:
            self.experts = ones
            self._counts = [1] * len(ones)
            self._order: Numbers = np.arange(len(ones))
        else:
            counts = np.bincount(chosen)
            self.experts = np.flatnonzero(counts).tolist()
            self._counts = counts[self.experts].tolist()
            self._order = chosen.argsort(kind="stable")
        bounds = pairwise(accumulate(self._counts, initial=0))
        self._bounds = dict(zip(self.experts, bounds, strict=True))

    def count(self, expert: int) -> int:
        first, last = self._bounds[expert]
        return last - first

    def part(self, experts: Sequence[int]) -> Part:
        """The pairs of these experts, each named once."""
        if experts == self.experts:
            pairs = self._order
        else:
            bounds = [self._bounds[expert] for expert in experts]
            pairs = np.concatenate([self._order[first:last] for first, last in bounds] or [self._order[:0]])
        rows = pairs // self.shape[1] if self.shape[0] > 1 else np.zeros_like(pairs)
        return Part(experts, [self.count(expert) for expert in experts], pairs, rows)

    def join(self, parts: Iterable[tuple[Part, torch.Tensor]], hidden: torch.Tensor) -> torch.Tensor:
        """[T, K, H] from the replies [n, H] of all parts, on the device and in the dtype of `hidden`."""
        parts = list(parts)
        if len(parts) == 1 and parts[0][0].pairs is self._order and self._in_order:
            return parts[0][1].to(hidden.device).view(*self.shape, -1)
        out = hidden.new_empty((self.shape[0] * self.shape[1], hidden.shape[1]))
        for part, replies in parts:
            out.index_copy_(0, _on(hidden, part.pairs), replies.to(out.device))
        return out.view(*self.shape, -1)

    def rows_of(self, experts: Iterable[int]) -> list[int]:
        """The rows that go to any of these experts, each once."""
        found: list[int] = np.unique(self.part(list(experts)).rows).tolist()
        return found


class ExpertBank:
    """The experts held here, by layer.  Pure functions of (unit, rows), called in any thread."""

    def __init__(self) -> None:
        self._kernels: dict[int, Any] = {}
        self._held: dict[tuple[int, int], Mapping[str, torch.Tensor]] = {}
        self.device = torch.device("cpu")
        """Where the experts are, and rows must be."""

    def add_layer(self, layer: int, module: Any) -> None:
        """Takes the layer's experts module for its gate, activation and layout; its own weights are not read."""
        self._kernels[layer] = module

    def add(self, layer: int, expert: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes one expert's weights, in the layout of the layer's module without its first axis."""
        self._held[layer, expert] = tensors
        self.device = next(iter(tensors.values())).device

    def holds(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._held

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The port, when all experts are here: see Experts."""
        pairs = Pairs(index)
        whole = pairs.part(pairs.experts)
        replies = self.rows(layer, hidden, whole)
        return pairs.join([(whole, replies)], hidden)

    def rows(self, layer: int, hidden: torch.Tensor, part: Part) -> torch.Tensor:
        """Each pair's expert applied to its row of `hidden` [T, H]; returns [n, H], in the part's order.

        Raises UnitMissing for an expert that is not held.
        """
        kernel = self._kernel(layer)
        weights = [self._weights(layer, expert) for expert in part.experts]
        out = hidden.index_select(0, _on(hidden, part.rows))
        for held, rows in zip(weights, out.split_with_sizes(list(part.counts)), strict=True):
            rows.copy_(feed_forward(kernel, held, rows))
        return out

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


def _on(rows: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    return torch.from_numpy(numbers).to(rows.device)


ALL_EXPERTS_FUNCTIONS.register("shoal", experts)
