"""Which experts of which layers, in few bytes: what a record says of them.  PROTOCOL.md, section 14.

Pure.  A bitset costs a byte for eight experts whatever the pattern; neighbouring layers share its frame, so that any
pattern of 256 experts in 58 layers costs 1,856 bytes and a few.  Runs are shorter where what is held lies together.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from protos import peers_pb2 as pb
from protos.errors import InvalidRecord
from protos.limits import EXPERTS_MAX, LAYERS_MAX, RECORD_EXPERT_LAYERS_MAX

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# What protobuf puts around a set of its own: the tags, lengths and numbers.
_FRAME_BYTES: Final = 10


def encode(experts: Mapping[int, int]) -> list[pb.ExpertSet]:
    """`experts`: layer -> bitmask, bit e is expert e.  A layer without any is left out."""
    sets: list[pb.ExpertSet] = []
    block = _Block()
    for first, layers, mask in _alike(experts):
        alone = _alone(first, layers, mask)
        # A set of its own also ends the block, and whatever follows needs a frame again.
        if layers * _bytes(mask) > alone.ByteSize() + _FRAME_BYTES:
            sets += [*block.sets(), alone]
            block = _Block()
        elif block.takes(first, layers, mask):
            block.masks += [mask] * layers
        else:
            sets += block.sets()
            block = _Block(first, [mask] * layers)
    return sets + block.sets()


def decode(sets: Iterable[pb.ExpertSet]) -> dict[int, int]:
    """Raises InvalidRecord: what cannot be, or a layer twice."""
    experts: dict[int, int] = {}
    for one in sets:
        layers = range(one.first_layer, one.first_layer + one.layers)
        if not layers or layers.stop > LAYERS_MAX or len(layers) + len(experts) > RECORD_EXPERT_LAYERS_MAX:
            raise _wrong(
                f"it names no layer, one beyond {LAYERS_MAX}, or more than {RECORD_EXPERT_LAYERS_MAX}, with experts"
            )
        for layer, mask in zip(layers, _masks(one), strict=True):
            if layer in experts:
                raise _wrong(f"it names the experts of layer {layer} twice")
            experts[layer] = mask
    return experts


def _alike(experts: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(first layer, layers, mask): consecutive layers with the same experts go together."""
    found: list[tuple[int, int, int]] = []
    for layer, mask in sorted(experts.items()):
        if not mask:
            continue
        if found and found[-1][2] == mask and found[-1][0] + found[-1][1] == layer:
            found[-1] = (found[-1][0], found[-1][1] + 1, mask)
        else:
            found.append((layer, 1, mask))
    return found


def _alone(first: int, layers: int, mask: int) -> pb.ExpertSet:
    bits = pb.ExpertSet(first_layer=first, layers=layers, bits=mask.to_bytes(_bytes(mask), "little"))
    runs = pb.ExpertSet(first_layer=first, layers=layers, runs=_runs(mask))
    return min(bits, runs, key=pb.ExpertSet.ByteSize)


@dataclass(slots=True)
class _Block:
    """Consecutive layers whose bitsets stand one after the other."""

    first: int = 0
    masks: list[int] = field(default_factory=list)

    def takes(self, first: int, layers: int, mask: int) -> bool:
        """Whether these layers follow, and go in without making the others much wider or being much widened."""
        if not self.masks or first != self.first + len(self.masks):
            return False
        width, wanted = max(map(_bytes, self.masks)), _bytes(mask)
        wider = max(width, wanted)
        return len(self.masks) * (wider - width) + layers * (wider - wanted) <= _FRAME_BYTES

    def sets(self) -> list[pb.ExpertSet]:
        if not self.masks:
            return []
        width = max(map(_bytes, self.masks))
        each = b"".join(mask.to_bytes(width, "little") for mask in self.masks)
        return [pb.ExpertSet(first_layer=self.first, layers=len(self.masks), each=each)]


def _bytes(mask: int) -> int:
    return (mask.bit_length() + 7) // 8


def _runs(mask: int) -> list[int]:
    """So many not held, so many held, and so on."""
    runs = []
    while mask:
        gap = (mask & -mask).bit_length() - 1
        mask >>= gap
        length = (~mask & (mask + 1)).bit_length() - 1
        mask >>= length
        runs += [gap, length]
    return runs


def _mask(runs: Sequence[int]) -> int:
    """Raises InvalidRecord."""
    if len(runs) % 2 or sum(runs) > EXPERTS_MAX or any(not length for length in runs[1:]):
        raise _wrong(f"its runs of experts are empty, or beyond {EXPERTS_MAX}")
    mask = start = 0
    for gap, length in zip(runs[::2], runs[1::2], strict=True):
        start += gap
        mask |= ((1 << length) - 1) << start
        start += length
    return mask


def _wrong(why: str) -> InvalidRecord:
    return InvalidRecord(f"a node's record is refused: {why}")


def _masks(one: pb.ExpertSet) -> list[int]:
    """One for each layer."""
    if bool(one.bits) + bool(one.each) + bool(one.runs) != 1:
        raise _wrong("it says its experts in no way, or in two")
    if one.each:
        return _each(one.each, one.layers)
    if one.runs:
        return [_mask(one.runs)] * one.layers
    if len(one.bits) > EXPERTS_MAX // 8:
        raise _wrong(f"its experts are beyond {EXPERTS_MAX}")
    return [int.from_bytes(one.bits, "little")] * one.layers


def _each(data: bytes, layers: int) -> list[int]:
    size, rest = divmod(len(data), layers)
    if rest or not 0 < size <= EXPERTS_MAX // 8:
        raise _wrong(f"its experts do not fit its layers, or are beyond {EXPERTS_MAX}")
    return [int.from_bytes(data[n * size : (n + 1) * size], "little") for n in range(layers)]
