"""Sizes: how many bytes it is what peers say that they hold.

Law: a record is its peer's word, so what it names and the manifest does not have counts for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from node.holding import Holding
from protos import units

if TYPE_CHECKING:
    from node.record import Held
    from protos.manifest import Manifest

SIZES_MAX: Final = 4096
"""Different holdings that are remembered: more than there are nodes that hold something different."""


class Sizes:
    """Of one model.  Most nodes hold what they held a second ago, so each holding is counted once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._known: dict[tuple[range, tuple[tuple[int, int], ...]], int] = {}

    def of(self, held: Held) -> int:
        """In bytes; 0 for another model, whose manifest is not here."""
        if held.model_id != self._manifest.model_id:
            return 0
        key = held.span, tuple(held.experts.items())
        size = self._known.get(key)
        if size is None:
            if len(self._known) >= SIZES_MAX:
                self._known.clear()
            size = self._known[key] = self._counted(held)
        return size

    def _counted(self, held: Held) -> int:
        layers = self._manifest.layers
        span = range(held.span.start, min(held.span.stop, layers))
        experts = {layer: mask for layer, mask in held.experts.items() if layer < layers}
        names = Holding(span, experts).units(self._manifest)
        return self._manifest.size([*([units.TEXT] if held.text else []), *names])
