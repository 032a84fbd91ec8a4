"""What a node has to tell: items that wait to ride on its messages.  PROTOCOL.md, section 15.

Pure.  Law: what was told least goes first, the newest of those before the others; an item rides on at most
`retransmit_multiplier * ceil(log10(n + 1))` messages; a newer claim takes the place of an older one of its subject.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from node.claim import Claim, encoded_bytes

if TYPE_CHECKING:
    from node.claim import Item, PeerHash

_Key: TypeAlias = "tuple[PeerHash, PeerHash | None]"

_ITEM_BYTES_MIN = 100
"""No item takes less: below it nothing more is looked for."""


class Broadcasts:
    """`length_max` bounds what waits."""

    __slots__ = ("_length_max", "_levels", "_told")

    def __init__(self, length_max: int) -> None:
        self._length_max = length_max
        self._told: dict[_Key, int] = {}  # how often
        self._levels: list[dict[_Key, tuple[Item, int]]] = [{}]  # by how often; with the bytes that it takes

    def __len__(self) -> int:
        return len(self._told)

    def add(self, item: Item) -> bool:
        """False: another one had to go before it was told often enough."""
        key = _key(item)
        self._discard(key)
        roomy = len(self._told) < self._length_max
        if not roomy:
            self._drop_one()
        self._told[key] = 0
        self._levels[0][key] = (item, encoded_bytes(item))
        return roomy

    def discard_suspicion(self, subject: PeerHash, accuser: PeerHash) -> None:
        """It has been refuted.  One that is not there is no error."""
        self._discard((subject, accuser))

    def take(self, room_bytes: int, items_max: int, members: int, profile_multiplier: int) -> list[Item]:
        """As many as fit, each told once more; claims come first, so that suspicions meet the claims they are about."""
        if not self._told:
            return []
        limit = retransmissions_max(members, profile_multiplier)
        taken: list[tuple[int, _Key]] = []
        for level, waiting in enumerate(self._levels):
            for key in reversed(waiting):
                if len(taken) == items_max or room_bytes < _ITEM_BYTES_MIN:
                    return self._tell(taken, limit)
                if waiting[key][1] <= room_bytes:
                    room_bytes -= waiting[key][1]
                    taken.append((level, key))
        return self._tell(taken, limit)

    def _tell(self, taken: list[tuple[int, _Key]], limit: int) -> list[Item]:
        claims: list[Item] = []
        suspicions: list[Item] = []
        for level, key in taken:
            entry = self._levels[level].pop(key)
            (claims if key[1] is None else suspicions).append(entry[0])
            if level + 1 >= limit:
                del self._told[key]
                continue
            self._told[key] = level + 1
            if level + 1 == len(self._levels):
                self._levels.append({})
            self._levels[level + 1][key] = entry
        return claims + suspicions

    def _discard(self, key: _Key) -> None:
        level = self._told.pop(key, None)
        if level is not None:
            del self._levels[level][key]

    def _drop_one(self) -> None:
        """The oldest of those that were told most often."""
        for waiting in reversed(self._levels):
            if waiting:
                self._discard(next(iter(waiting)))
                return


def retransmissions_max(members: int, multiplier: int) -> int:
    """SWIM's lambda log n, as memberlist counts it."""
    return multiplier * math.ceil(math.log10(members + 1))


def _key(item: Item) -> _Key:
    return (item.peer, None) if isinstance(item, Claim) else (item.subject, item.accuser)
