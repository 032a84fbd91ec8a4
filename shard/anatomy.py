"""Which unit owns which tensor of a model.  The only file that reads transformers' module tree by name.

A decoder is `embed`, layers, `head`. Inside a layer the experts are the one module whose class transformers lets us
replace (`use_experts_implementation`); its stacked parameters [E, ...] are cut along E, everything else is the
layer's trunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from protos import units
from protos.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from protos.ids import UnitName


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a unit: `source` in the model's state dict, `[expert]` of it when the tensor stacks experts."""

    unit: UnitName
    local: str
    source: str
    expert: int | None = None


def is_experts(module: nn.Module) -> bool:
    """True for a module that runs through transformers' experts interface."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed") and hasattr(module, "num_experts")


class Anatomy:
    """The units of one CausalLM, read off its module tree; parameters may live on the meta device."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base: Any = model.base_model
        self.base_prefix = model.base_model_prefix + "."
        if self.base is model or not hasattr(self.base, "layers"):
            raise UnsupportedModel(
                f"{type(model).__name__} is not a decoder with a list of layers; shoal cannot cut it"
            )
        self.layers = len(self.base.layers)
        self.experts: dict[int, tuple[str, nn.Module]] = {}
        for index, layer in enumerate(self.base.layers):
            self._find_experts(index, layer)
        if not self.experts:
            raise UnsupportedModel(
                f"{type(model).__name__} is dense: no layer has routed experts that can be shared out"
            )

    def _find_experts(self, index: int, layer: nn.Module) -> None:
        found = [(name, module) for name, module in layer.named_modules() if is_experts(module)]
        if len(found) > 1:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: layer {index} has {len(found)} expert modules, expected one"
            )
        if found:
            self.experts[index] = found[0]

    @property
    def tied(self) -> bool:
        return bool(self.model.config.get_text_config().tie_word_embeddings)

    def expert_count(self, layer: int) -> int:
        """Routed experts of a layer; 0 for a dense one."""
        return int(self.experts[layer][1].num_experts) if layer in self.experts else 0  # type: ignore[arg-type]

    def parts(self) -> Iterator[Part]:
        """Every tensor of the model's state dict, by owner.  A tied output projection belongs to `embed`."""
        for source, tensor in self.model.state_dict().items():
            yield from self._parts_of(source, tensor)

    def _parts_of(self, source: str, tensor: torch.Tensor) -> Iterator[Part]:
        local = source.removeprefix(self.base_prefix)
        if local == source:  # outside the base model: the output projection
            if not (self.tied and source == "lm_head.weight"):
                yield Part(units.HEAD, source, source)
        elif local.startswith("layers."):
            _, index, name = local.split(".", 2)
            yield from self._parts_of_layer(int(index), name, source, tensor)
        elif "embed" in local:
            yield Part(units.EMBED, local, source)
        else:
            yield Part(units.HEAD, local, source)

    def _parts_of_layer(self, layer: int, name: str, source: str, tensor: torch.Tensor) -> Iterator[Part]:
        path = self.experts[layer][0] + "." if layer in self.experts else None
        if path is None or not name.startswith(path) or "." in name.removeprefix(path):
            yield Part(units.trunk(layer), name, source)
            return
        count = self.expert_count(layer)
        if tensor.shape[0] != count:
            raise UnsupportedModel(f"{source} has shape {tuple(tensor.shape)}: it does not stack {count} experts")
        for index in range(count):
            yield Part(units.expert(layer, index), name.removeprefix(path), source, index)

    def tensors(self) -> dict[UnitName, dict[str, torch.Tensor]]:
        """The units of a model that has its weights, as views of them."""
        state = self.model.state_dict()
        found: dict[UnitName, dict[str, torch.Tensor]] = {}
        for part in self.parts():
            tensor = state[part.source]
            found.setdefault(part.unit, {})[part.local] = tensor if part.expert is None else tensor[part.expert]
        return found

    def source(self, unit: UnitName, local: str) -> str:
        """The state dict name of a unit's tensor (of the stacked tensor, for an expert's)."""
        kind = units.parse(unit)
        if kind.kind == "trunk":
            return f"{self.base_prefix}layers.{kind.layer}.{local}"
        if kind.kind == "expert":
            assert kind.layer is not None
            return f"{self.base_prefix}layers.{kind.layer}.{self.experts[kind.layer][0]}.{local}"
        return local if local.startswith("lm_head.") else self.base_prefix + local
