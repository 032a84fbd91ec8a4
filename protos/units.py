"""Unit names: `text`, `embed`, `trunk.L`, `expert.L.E`, `head` (layers and experts count from 0).

Pure. One spelling per unit: no leading zeros, no signs, ASCII digits.
"""

import re
from dataclasses import dataclass
from typing import Final, Literal

from protos.errors import InvalidManifest
from protos.ids import UnitName
from protos.limits import EXPERTS_MAX, LAYERS_MAX

TEXT: Final = UnitName("text")
EMBED: Final = UnitName("embed")
HEAD: Final = UnitName("head")

Kind = Literal["text", "embed", "trunk", "expert", "head"]

_NUMBER = r"(0|[1-9][0-9]{0,4})"
_NAME_CHARS_MAX = len("expert.99999.99999")
_NAME = re.compile(rf"(?:(text|embed|head)|trunk\.{_NUMBER}|expert\.{_NUMBER}\.{_NUMBER})")


@dataclass(frozen=True, slots=True)
class Unit:
    """A parsed name; `layer` and `expert` are None where the kind has none."""

    kind: Kind
    layer: int | None = None
    expert: int | None = None


_SINGLES = {"text": Unit("text"), "embed": Unit("embed"), "head": Unit("head")}


def trunk(layer: int) -> UnitName:
    """The attention, norms, router and dense parts of a layer."""
    return UnitName(f"trunk.{layer}")


def expert(layer: int, e: int) -> UnitName:
    """Expert `e` of a layer."""
    return UnitName(f"expert.{layer}.{e}")


def parse(name: str) -> Unit:
    """The unit that `name` spells. Raises InvalidManifest."""
    match = _NAME.fullmatch(name) if len(name) <= _NAME_CHARS_MAX else None
    if match is None:
        raise InvalidManifest(
            f"{name[:_NAME_CHARS_MAX]!r} is not the name of a unit: text, embed, trunk.L, expert.L.E and head are"
        )
    single, trunk_layer, expert_layer, number = match.groups()
    if single is not None:
        return _SINGLES[single]
    if trunk_layer is not None:
        return Unit("trunk", _below(LAYERS_MAX, trunk_layer, name))
    return Unit("expert", _below(LAYERS_MAX, expert_layer, name), _below(EXPERTS_MAX, number, name))


def order(name: str) -> tuple[int, int, int, int]:
    """The sort key of a name: text, embed, trunk.0, expert.0.0, expert.0.1, ..., trunk.1, ..., head."""
    match parse(name):
        case Unit("text"):
            return (0, 0, 0, 0)
        case Unit("embed"):
            return (1, 0, 0, 0)
        case Unit("head"):
            return (3, 0, 0, 0)
        case Unit(_, layer, None):
            return (2, layer or 0, 0, 0)
        case Unit(_, layer, number):
            return (2, layer or 0, 1, number or 0)


def _below(limit: int, digits: str, name: str) -> int:
    value = int(digits)
    if value >= limit:
        raise InvalidManifest(f"unit {name!r}: {value} is not below the limit of {limit}")
    return value
