"""What a node holds of a model: the words of `--hold` against a manifest.

Pure.  The words add up: `all`, `span:LAYERS` (trunk and all experts), `trunk:LAYERS`, `experts:LAYERS/EXPERTS`.  LAYERS
and EXPERTS are `*`, `A-B` (both included) or a list such as `0,4,8-11`; EXPERTS may be `i%n`: every expert e with
e mod n = i.  The trunk must be one span of consecutive layers on the manifest's grid, and is served whole.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from node.record import Held
from protos import units
from protos.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from protos.ids import UnitName
    from protos.manifest import Manifest

_PART = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")
_STRIDE = re.compile(r"(\d{1,5})%(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Holding:
    """`span`: layers whose trunk is held; `experts`: layer -> bitmask, bit e is expert e."""

    span: range
    experts: Mapping[int, int] = field(default_factory=dict)

    def units(self, manifest: Manifest) -> Iterator[UnitName]:
        """All but `text`."""
        if self.span and self.span.start == 0:
            yield units.EMBED
        yield from (units.trunk(layer) for layer in self.span)
        for layer, mask in self.experts.items():
            yield from (units.expert(layer, e) for e in range(manifest.experts[layer]) if mask >> e & 1)
        if self.span and self.span.stop == manifest.layers:
            yield units.HEAD

    def held(self, manifest: Manifest) -> Held:
        """The same, as the node's record says it."""
        return Held(
            model_id=manifest.model_id,
            text=True,
            span=self.span,
            embed=bool(self.span) and self.span.start == 0,
            head=bool(self.span) and self.span.stop == manifest.layers,
            experts=self.experts,
        )


def whole(manifest: Manifest) -> Holding:
    return parse(("all",), manifest)


def parse(words: Sequence[str], manifest: Manifest) -> Holding:
    """Raises InvalidRequest, naming the word and what it may be."""
    trunk: set[int] = set()
    experts: dict[int, int] = {}
    for word in words:
        kind, _, rest = ("span", ":", "*") if word == "all" else word.partition(":")
        layers, _, chosen = rest.partition("/")
        if kind not in ("span", "trunk", "experts") or bool(chosen) != (kind == "experts"):
            raise _wrong(word, "give all, span:A-B, trunk:A-B or experts:LAYERS/EXPERTS")
        numbers = _numbers(layers, manifest.layers, word, "layers")
        if kind != "experts":
            trunk |= numbers
        if kind != "trunk":
            for layer in numbers:
                mask = _mask(chosen or "*", manifest.experts[layer], word)
                if mask:
                    experts[layer] = experts.get(layer, 0) | mask
    return Holding(_span(trunk, manifest), dict(sorted(experts.items())))


def _span(trunk: set[int], manifest: Manifest) -> range:
    if not trunk:
        return range(0)
    span = range(min(trunk), max(trunk) + 1)
    if len(span) != len(trunk):
        raise InvalidRequest(f"the trunk of layers {_listed(trunk)}: a node's span has no gaps; hold one run of layers")
    grain = manifest.grain
    if span.start % grain or (span.stop % grain and span.stop != manifest.layers):
        raise InvalidRequest(
            f"the trunk of layers {span.start} to {span.stop - 1}: "
            f"spans of this model begin at multiples of {grain} layers"
        )
    return span


def _mask(text: str, count: int, word: str) -> int:
    if not count:  # a dense layer
        return 0
    if stride := _STRIDE.fullmatch(text):
        first, step = int(stride[1]), int(stride[2])
        if not 0 <= first < step:
            raise _wrong(word, f"in {text} the first number must be below the second")
        return sum(1 << e for e in range(first, count, step))
    return sum(1 << e for e in _numbers(text, count, word, "experts"))


def _numbers(text: str, count: int, word: str, what: str) -> set[int]:
    if text == "*":
        return set(range(count))
    found: set[int] = set()
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None:
            raise _wrong(word, f"{part!r:.40} is no number and no A-B")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < count:
            raise _wrong(word, f"{part} is not within the {count} {what} of this model (0 to {count - 1})")
        found.update(range(first, last + 1))
    return found


def _listed(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:8])) + (", ..." if len(numbers) > 8 else "")


def _wrong(word: str, why: str) -> InvalidRequest:
    return InvalidRequest(f"hold {word!r:.80}: {why}")
