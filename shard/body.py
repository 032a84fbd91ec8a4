"""A checkpoint's own transformers model, cut to a span of layers.  No model code of our own.

The model is built on the meta device in full, so that layer indices, masks and RoPE are the checkpoint's. Layers that
are not held pass their input through; the last of them before the span is the inlet, which discards what the base
model made of its embeddings and gives the rows that came in; the first after the span is the outlet, which leaves the
forward with the rows that go out. So nothing that a base model does before its layers (embedding multipliers) or
after (final norm) happens twice.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import shard.attention
import shard.experts  # noqa: F401  (both register a seam)
from protos import units
from protos.errors import InvalidManifest, UnsupportedModel
from shard.anatomy import Anatomy
from shard.kv import LayerKv, RaggedCache, SessionKv, Slice
from shard.linear import speed_up

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PretrainedConfig

    from protos.ids import UnitName
    from shard.experts import Experts

    Tensors = Callable[[UnitName], Mapping[str, torch.Tensor]]


def parse_config(data: bytes) -> PretrainedConfig:
    """The configuration in a config.json.  Raises UnsupportedModel for a type that transformers does not have."""
    try:
        fields = json.loads(data)
    except ValueError as error:
        raise UnsupportedModel(f"config.json cannot be read: {error}") from None
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise UnsupportedModel(f"model type {kind!r:.80} is not one that this transformers knows")
    try:
        return CONFIG_MAPPING[kind].from_dict(fields)
    except Exception as error:
        raise UnsupportedModel(f"{kind}: transformers cannot read its config.json: {error}") from error


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """The CausalLM of a configuration with our seams in place and all parameters on the meta device."""
    config = copy.deepcopy(config)
    config.use_cache = True
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="shoal", experts_implementation="shoal"
        )
    return model.eval().requires_grad_(False)


class Body:
    """The layers of a span, with `embed` before them where it starts at 0, and `head` after them where it ends last."""

    def __init__(
        self,
        config: PretrainedConfig,
        dtype: torch.dtype,
        span: range,
        tensors: Tensors,
        experts: Experts,
        device: torch.device,
    ) -> None:
        self.model = skeleton(config, dtype)
        self.anatomy = Anatomy(self.model)
        self.span, self.dtype, self.device = span, dtype, device
        self.is_first, self.is_last = span.start == 0, span.stop == self.anatomy.layers
        self._make_buffers()
        self._fill(tensors)
        self._cut(experts)
        speed_up(self.model)
        self.rope = RegimeRotary.over(self.anatomy.base)
        self._attentions = self._find_attentions()
        self.kv_layers, self.direct = self._probe()

    @property
    def hidden(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def held_units(self) -> list[UnitName]:
        names = [units.trunk(layer) for layer in self.span]
        return [units.EMBED] * self.is_first + names + [units.HEAD] * self.is_last

    def forward(
        self,
        tokens: torch.Tensor | None,
        rows: torch.Tensor | None,
        positions: torch.Tensor,
        cache: RaggedCache,
        ends: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """One packed batch through the span: tokens [1, T] or rows [T, H], positions [1, T]; returns [T, H].

        `ends` has, per slice of the cache, the position after the last row of its whole feed (RoPE may depend on it).
        The last span's rows have passed the final norm.
        """
        for attention in self._attentions:
            attention.shoal_cache = cache
        if self.rope is not None:
            self.rope.choose(cache.slices, ends)
        inputs: dict[str, Any] = {"input_ids": tokens}
        if rows is not None:
            self._inlet.rows = rows.unsqueeze(0)
            inputs = {"inputs_embeds": self._inlet.rows}
        try:
            output = self.anatomy.base(**inputs, position_ids=positions, past_key_values=cache, use_cache=True)
        except _SpanEnd as end:
            return end.rows[0]
        finally:
            self._inlet.rows = None
            cache.slices = ()  # attention modules keep the cache; it must not keep a closed session's KV
        last: torch.Tensor = output.last_hidden_state[0]
        return last

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [N, V] of rows [N, H] that have passed the final norm, by the model's own head code."""
        self._replay.rows = rows.unsqueeze(0)
        logits: torch.Tensor = self._head_model(inputs_embeds=self._replay.rows, use_cache=False).logits[0]
        self._replay.rows = None
        return logits

    def _make_buffers(self) -> None:
        """Gives buffers that no checkpoint carries (RoPE frequencies) their values, as from_pretrained does."""
        for module in self.model.modules():
            missing = [name for name in module._non_persistent_buffers_set if module._buffers[name] is not None]
            for name in missing:
                module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
            if missing:
                self.model._init_weights(module)
            for name in missing:
                module._buffers[name] = module._buffers[name].to(self.device)

    def _fill(self, tensors: Tensors) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        for unit in self.held_units():
            for local, tensor in tensors(unit).items():
                name = self.anatomy.source(unit, local)
                if shapes.get(name) != tuple(tensor.shape):
                    raise InvalidManifest(
                        f"{unit}: {local} has the shape {tuple(tensor.shape)}, the model's is {shapes.get(name)}"
                    )
                self._set(name, tensor.to(self.device))
        if self.is_last and self.anatomy.tied:
            embed = self.model.get_input_embeddings().weight
            if embed.is_meta:  # the last span of several: it has the head unit, which lists embed's tensor
                (embed,) = tensors(units.EMBED).values()
            self._set("lm_head.weight", embed.to(self.device))

    def _set(self, name: str, tensor: torch.Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        if leaf in module._buffers:
            module._buffers[leaf] = tensor
        else:
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)

    def _cut(self, experts: Experts) -> None:
        layers = self.anatomy.base.layers
        self._inlet = _Inlet()
        for index in range(len(layers)):
            if index in self.span:
                if index in self.anatomy.experts:
                    module: Any = self.anatomy.experts[index][1]
                    module.shoal_layer, module.shoal_experts = index, experts
            elif index == self.span.start - 1:
                layers[index] = _like(layers[index], self._inlet)
            elif index == self.span.stop:
                layers[index] = _like(layers[index], _Outlet())
            else:
                layers[index] = _like(layers[index], _Through())
        if self.is_last:
            self._replay = _Replay(self.anatomy.base)
            self._head_model = copy.copy(self.model)
            self._head_model._modules = dict(self.model._modules)
            self._head_model._modules[self.model.base_model_prefix] = self._replay
        leaked = [
            name for name, tensor in self.model.state_dict().items() if tensor.is_meta and not self._elsewhere(name)
        ]
        if leaked:
            raise UnsupportedModel(f"{type(self.model).__name__}: no unit of the span gives {leaked[0]}")

    def _elsewhere(self, name: str) -> bool:
        """True for a tensor that another peer, or the port to the experts, answers for."""
        local = name.removeprefix(self.anatomy.base_prefix)
        if local.startswith("layers."):
            index = int(local.split(".")[1])
            return index in self.anatomy.experts and local.startswith(
                f"layers.{index}.{self.anatomy.experts[index][0]}."
            )
        return not (self.is_first if "embed" in local else self.is_last)

    def _find_attentions(self) -> list[Any]:
        layers = self.anatomy.base.layers
        return [
            m for i in self.span for m in layers[i].modules() if hasattr(m, "layer_idx") and hasattr(m, "is_causal")
        ]

    def _probe(self) -> tuple[dict[int, LayerKv], frozenset[int]]:
        """Runs one row to learn what each layer caches, and whether its keys reach attention as they left the cache."""
        probe = _ProbeCache()
        one = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        modules: list[Any] = [self.anatomy.experts[i][1] for i in self.span if i in self.anatomy.experts]
        ports = [module.shoal_experts for module in modules]
        for module in modules:
            module.shoal_experts = _no_experts
        rows = None if self.is_first else torch.zeros((1, self.hidden), dtype=self.dtype, device=self.device)
        try:
            with torch.inference_mode():
                self.forward(one if self.is_first else None, rows, one, probe)
        finally:
            for module, port in zip(modules, ports, strict=True):
                module.shoal_experts = port
        missing = [index for index in self.span if index not in probe.layers]
        if missing:
            raise UnsupportedModel(
                f"{type(self.model).__name__}: layer {missing[0]} keeps no KV (recurrent layers are not supported)"
            )
        return probe.layers, frozenset(probe.untouched)


def _no_experts(layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return hidden.new_zeros((*index.shape, hidden.shape[1]))


class _ProbeCache(RaggedCache):
    """Stores nothing: records the shapes that come in, and in which layers they reach attention untouched."""

    def __init__(self) -> None:
        nothing = SessionKv({}, 0, torch.device("cpu"))
        super().__init__((Slice(nothing, start=0, first=0, last=1),), frozenset())
        self.layers: dict[int, LayerKv] = {}
        self.untouched: set[int] = set()
        self._returned: dict[int, torch.Tensor] = {}

    def reached(self, layer: int, key: torch.Tensor) -> None:
        if self._returned[layer] is key:
            self.untouched.add(layer)

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.layers[layer_idx] = LayerKv(key.shape[1], key.shape[3], value.shape[1], value.shape[3], key.dtype)
        self._returned[layer_idx] = key
        return key, value


class _SpanEnd(Exception):  # noqa: N818  (not an error: how a span leaves a forward that goes on to the head)
    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = rows


class _Through(nn.Module):
    """Stands where a layer is not held."""

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return hidden_states


class _Inlet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None

    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        assert self.rows is not None
        return self.rows


class _Outlet(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        raise _SpanEnd(hidden_states)


class _Replay(nn.Module):
    """Stands for the base model when only the head is wanted: gives the rows back."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.rows: torch.Tensor | None = None
        self.config = base.config

    def forward(self, *_: object, **__: object) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.rows)


def _like(layer: nn.Module, stand_in: nn.Module) -> nn.Module:
    """Copies the plain attributes that base models read from a layer (attention_type, layer_idx) to its stand-in."""
    for name, value in vars(layer).items():
        if not name.startswith("_") and isinstance(value, str | int | bool):
            setattr(stand_in, name, value)
    return stand_in


class RegimeRotary(nn.Module):
    """RoPE whose factors depend on the length of the whole input (longrope), for batches that mix both kinds.

    transformers picks one set of factors per forward, by its largest position. Here the rows of each side go through
    the checkpoint's own module apart, with one more position that puts the module on that side.
    """

    def __init__(self, inner: Any, boundary: int) -> None:
        super().__init__()
        self.inner = inner
        self.boundary = boundary
        self._long: torch.Tensor | None = None

    @classmethod
    def over(cls, base: Any) -> RegimeRotary | None:
        """Wraps the base model's RoPE where its type calls for it."""
        config = base.config
        rope = getattr(config, "rope_parameters", None) or {}
        nested = [value for value in rope.values() if isinstance(value, dict)]
        kinds = {str(part.get("rope_type", "default")) for part in (nested or [rope])}
        if "longrope" not in kinds:
            return None
        if nested or not hasattr(base, "rotary_emb"):
            raise UnsupportedModel(f"{config.model_type}: longrope that differs by layer type is not supported")
        boundary = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        base.rotary_emb = cls(base.rotary_emb, int(boundary))
        return base.rotary_emb  # type: ignore[no-any-return]

    def choose(self, slices: Sequence[Slice], ends: Sequence[int] | None) -> None:
        """Sets the sides of the next forward: a feed that ends beyond the boundary is long in all its rows."""
        lengths = [part.end for part in slices] if ends is None else ends
        flags = [
            length > self.boundary
            for part, length in zip(slices, lengths, strict=True)
            for _ in range(part.first, part.last)
        ]
        self._long = torch.tensor(flags, dtype=torch.bool)

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """cos and sin [1, T, D] for position_ids [1, T]."""
        assert self._long is not None
        long = self._long.to(position_ids.device)
        if not bool(long.any()):
            return tuple(self.inner(x, position_ids))
        outputs: tuple[torch.Tensor, ...] | None = None
        for side in (True, False):
            rows = (long == side).nonzero()[:, 0]
            if rows.numel() == 0:
                continue
            beyond = position_ids.new_full((1, 1), self.boundary if side else 0)
            found = self.inner(x, torch.cat([position_ids[:, rows], beyond], dim=1))
            if outputs is None:
                outputs = tuple(f.new_empty((1, long.numel(), f.shape[-1])) for f in found)
            for out, f in zip(outputs, found, strict=True):
                out[:, rows] = f[:, :-1]
        assert outputs is not None
        return outputs
