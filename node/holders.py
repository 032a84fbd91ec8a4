"""Holders: who says that it holds which unit.  An index over the routing table, kept as records come and go.

Pure.  Law: it says what the records say, at once.  By model it is always there; by layer from the first question on, so
that models of which nobody asks cost next to nothing, however many layers somebody claims to hold.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

from protos import units

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from node.record import Held
    from protos.ids import PeerId


class Holders:
    """Of all models."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}

    def put(self, peer: PeerId, held: Iterable[Held]) -> None:
        for one in held:
            self._models.setdefault(one.model_id, _Model()).put(peer, one)

    def drop(self, peer: PeerId, held: Iterable[Held]) -> None:
        for one in held:
            model = self._models[one.model_id]
            model.drop(peer, one)
            if not model.held:
                del self._models[one.model_id]

    def of_model(self, model_id: str) -> Mapping[PeerId, Held]:
        """Everybody who holds some of it, and what.  Frozen: it stays as it is while the index changes."""
        model = self._models.get(model_id)
        return MappingProxyType({}) if model is None else model.frozen()

    def of_unit(self, model_id: str, name: str) -> tuple[PeerId, ...]:
        """In no particular order.  Raises InvalidManifest for what is no unit's name."""
        unit = units.parse(name)
        model = self._models.get(model_id)
        return () if model is None else model.holders(unit)


class _Model:
    def __init__(self) -> None:
        self.held: dict[PeerId, Held] = {}
        self._is_shared = False
        self._experts: dict[int, dict[PeerId, int]] = {}  # masks by layer, of layers that were asked for
        # Answers, by layer (-1: of none), until a record changes something there.
        self._found: dict[int, dict[units.Unit, tuple[PeerId, ...]]] = {}

    def put(self, peer: PeerId, held: Held) -> None:
        self._thaw()
        self.held[peer] = held
        for layer, masks in self._experts.items():
            if mask := held.experts.get(layer):
                masks[peer] = mask
        self._forget_answers(held)

    def drop(self, peer: PeerId, held: Held) -> None:
        self._thaw()
        del self.held[peer]
        for masks in self._experts.values():
            masks.pop(peer, None)
        self._forget_answers(held)

    def frozen(self) -> Mapping[PeerId, Held]:
        self._is_shared = True
        return MappingProxyType(self.held)

    def holders(self, unit: units.Unit) -> tuple[PeerId, ...]:
        answers = self._found.setdefault(-1 if unit.layer is None else unit.layer, {})
        found = answers.get(unit)
        if found is None:
            found = answers[unit] = self._holders(unit)
        return found

    def _holders(self, unit: units.Unit) -> tuple[PeerId, ...]:
        match unit:
            case units.Unit("expert", int(layer), int(number)):
                return tuple(peer for peer, mask in self._masks(layer).items() if mask >> number & 1)
            case units.Unit("trunk", int(layer)):
                return tuple(peer for peer, held in self.held.items() if layer in held.span)
            case _:
                return tuple(peer for peer, held in self.held.items() if getattr(held, unit.kind))

    def _masks(self, layer: int) -> dict[PeerId, int]:
        masks = self._experts.get(layer)
        if masks is None:
            masks = {peer: mask for peer, held in self.held.items() if (mask := held.experts.get(layer))}
            self._experts[layer] = masks
        return masks

    def _forget_answers(self, held: Held) -> None:
        for layer in (-1, *held.span, *held.experts):
            self._found.pop(layer, None)

    def _thaw(self) -> None:
        """Whoever has a frozen mapping keeps it as it was."""
        if self._is_shared:
            self.held = dict(self.held)
            self._is_shared = False
