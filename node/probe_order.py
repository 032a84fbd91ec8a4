"""The order in which a round of probes visits its members: a random permutation that takes no memory.

Pure.  Law: each of 0 .. n-1 comes exactly once.  It is a keyed Feistel network over the next power of four; a value
that falls beyond n is sent through again (cycle walking), so what stays inside is a permutation too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random

_ROUNDS = 4
_MIX = 0x9E3779B97F4A7C15  # 2**64 / golden ratio, as in Fibonacci hashing
_WORD = (1 << 64) - 1


class ProbeOrder:
    """`order[i]` is the index that is visited as the i-th of `n`."""

    __slots__ = ("_half_bits", "_keys", "_mask", "n")

    def __init__(self, n: int, random: random.Random) -> None:
        self.n = n
        self._half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        self._keys = tuple(random.getrandbits(64) for _ in range(_ROUNDS))

    def __getitem__(self, place: int) -> int:
        """Raises IndexError beyond the last one, which would otherwise walk for ever."""
        if not 0 <= place < self.n:
            raise IndexError(place)
        found = self._encrypt(place)
        while found >= self.n:
            found = self._encrypt(found)
        return found

    def _encrypt(self, value: int) -> int:
        left, right = value >> self._half_bits, value & self._mask
        for key in self._keys:
            mixed = ((right ^ key) * _MIX) & _WORD
            mixed = ((mixed ^ (mixed >> 29)) * _MIX) & _WORD
            left, right = right, left ^ ((mixed >> 32) & self._mask)
        return (left << self._half_bits) | right
