"""Which tensors of a checkpoint make which tensors of the model: transformers' own loading, one target at a time.

Law: names, merging, order and dtypes are those of transformers' `convert_and_load_state_dict_in_model`; nothing here
knows a family.  That function fills a whole model; this one plans the same for all keys first, runs the plan on the
meta device (so that a checkpoint that does not fit is refused before a byte is written), and then gives one group of
tensors at a time.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from protos.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from shard.stored import Source

NAMED_MAX = 5
"""Tensors that an error lists before it says how many more there are."""


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint tensor on its way: the first parameter it goes to, the pattern that matched, the dtype it gets."""

    key: str
    target: str
    pattern: str
    dtype: torch.dtype


@dataclass(slots=True)
class Step:
    """One conversion: a converter of transformers (None: the tensor as it is) and what it takes."""

    target: str
    converter: Any
    inputs: list[Input] = field(default_factory=list)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    """What it makes, on the meta device."""


class Conversion:
    """A plan for all tensors of `model`, whose parameters are on the meta device.  Raises UnsupportedModel."""

    def __init__(self, model: Any, dtype: torch.dtype, sources: Mapping[str, Source]) -> None:
        self.model = model
        self.sources = sources
        self.expected: dict[str, torch.Tensor] = model.state_dict()
        plan = model._get_dtype_plan(dtype)
        self._kept = build_glob_alternation(list(plan))[0] if plan else None
        self._kept_dtypes = {f"g{index}": kept for index, kept in enumerate(plan.values())}
        steps, unknown = self._plan()
        self._refuse_unknown(unknown)
        self.steps: dict[str, Step] = {}
        for step in steps:
            self._rehearse(step)

    def missing(self) -> set[str]:
        """Tensors of the model that no tensor of the checkpoint makes."""
        return self.expected.keys() - self.steps.keys()

    def make(self, targets: Collection[str]) -> dict[str, torch.Tensor]:
        """Reads and converts; the largest conversion runs first, while the least is held beside it."""
        steps = {id(self.steps[target]): self.steps[target] for target in targets}
        ordered = sorted(steps.values(), key=_nbytes, reverse=True)
        made: dict[str, torch.Tensor] = {}
        for step in ordered:
            made |= {name: t for name, t in self._run(step, self._read).items() if name in targets}
        return made

    def _plan(self) -> tuple[list[Step], dict[str, str]]:
        """The steps, and the unknown keys: the name that transformers would look for -> the checkpoint's."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        steps: dict[str, Step] = {}
        unknown: dict[str, str] = {}
        for key in sorted(self.sources, key=dot_natural_key):
            target, pattern = self._target(key, renamings, converters)
            if target not in self.expected:
                unknown[target] = key
                continue
            step = steps.setdefault(target, Step(target, by_pattern.get(pattern)))
            if step.inputs and (pattern is None or step.converter is None):
                raise UnsupportedModel(f"two tensors of the checkpoint are {target}: {step.inputs[0].key} and {key}")
            step.inputs.append(Input(key, target, pattern or key, self._dtype_of(target)))
        return list(steps.values()), unknown

    def _target(self, key: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(key, renamings, converters, prefix, self.expected)
        if target not in self.expected and key in self.expected:
            target, pattern = rename_source_key(key, [], [], prefix, self.expected)
        return target, pattern

    def _dtype_of(self, target: str) -> torch.dtype:
        match = self._kept.search(target) if self._kept is not None else None
        return self._kept_dtypes[match.lastgroup] if match is not None else self.expected[target].dtype

    def _refuse_unknown(self, unknown: Mapping[str, str]) -> None:
        """Refuses keys that transformers would report as unexpected; those that it ignores are skipped."""
        report = SimpleNamespace(missing_keys=set(), unexpected_keys=set(unknown))
        self.model._adjust_missing_and_unexpected_keys(report)
        keys = sorted(unknown[target] for target in report.unexpected_keys)
        if keys:
            raise UnsupportedModel(f"{type(self.model).__name__} has no place for the checkpoint's {listed(keys)}")

    def _rehearse(self, step: Step) -> None:
        step.outputs = self._run(step, self._read_meta)
        for name, tensor in step.outputs.items():
            if name not in self.expected:
                raise UnsupportedModel(
                    f"the checkpoint's {step.inputs[0].key} makes {name}, which the model has no place for"
                )
            wanted = self.expected[name]
            if tensor.shape != wanted.shape:
                raise UnsupportedModel(
                    f"{name} comes out as {list(tensor.shape)}, the configuration says {list(wanted.shape)}"
                    f" ({len(step.inputs)} tensors of the checkpoint, the first is {step.inputs[0].key})"
                )
            self.steps[name] = step

    def _run(self, step: Step, read: Callable[[Input], torch.Tensor]) -> dict[str, torch.Tensor]:
        if step.converter is None:
            return {step.target: read(step.inputs[0])}
        converter = deepcopy(step.converter)
        for each in step.inputs:
            converter.add_tensor(each.target, each.key, each.pattern, partial(read, each))
        try:
            made = converter.convert(step.target, model=self.model, config=self.model.config)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            raise UnsupportedModel(
                f"{step.target} cannot be made of {listed([each.key for each in step.inputs])}: {error}"
            ) from error
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _read(self, each: Input) -> torch.Tensor:
        return self.sources[each.key].read(each.dtype)

    def _read_meta(self, each: Input) -> torch.Tensor:
        return torch.empty(self.sources[each.key].shape, dtype=each.dtype, device="meta")


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED_MAX
    return ", ".join(names[:NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def _nbytes(step: Step) -> int:
    return sum(tensor.nbytes for tensor in step.outputs.values())
