"""Reached: peers of an open network that answered, and how many there are of them at one place.

Pure.  Law: an answer costs nothing but an address, so each place has room for so many that nobody pushes out, however
many identities answer there.  PROTOCOL.md, section 14.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from node.address import site
from protos.limits import REACHED_OF_SITE_MAX

if TYPE_CHECKING:
    from protos.ids import PeerId


class Reached:
    """By the site of the host where they answered, which is not always the one that they have moved to since."""

    def __init__(self) -> None:
        self._site_of: dict[PeerId, str] = {}
        self._count_of: Counter[str] = Counter()

    def has_room(self, host: str) -> bool:
        return self._count_of[site(host)] < REACHED_OF_SITE_MAX

    def add(self, peer: PeerId, host: str) -> bool:
        """Whether there was room, or it is counted there already.  Otherwise nothing changes."""
        place = site(host)
        if self._site_of.get(peer) != place:
            if self._count_of[place] >= REACHED_OF_SITE_MAX:
                return False
            self.discard(peer)
            self._site_of[peer] = place
            self._count_of[place] += 1
        return True

    def discard(self, peer: PeerId) -> None:
        place = self._site_of.pop(peer, None)
        if place is not None:
            self._count_of[place] -= 1
            if not self._count_of[place]:
                del self._count_of[place]
