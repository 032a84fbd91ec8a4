"""What a stage has room for, and how doors share it.  Pure.

Law: the last eighth is for doors that have no session here yet; so a door that is alone may use nearly all, and none
keeps another out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from protos.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from protos.ids import PeerId

KEPT_PARTS: Final = 8
"""One part of so many is kept: a session of a usual length in a KV that holds eight."""
RETRY_AFTER_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """`positions`: of KV, of all sessions together."""

    sessions: int
    positions: int

    def check(self, door: PeerId, positions: int, opened: Sequence[tuple[PeerId, int]]) -> None:
        """May this door open one more?  `opened`: doors and positions of what is open.  Raises Overloaded.

        That it fits at all is for the stage to say, which reserves it.
        """
        if all(other != door for other, _ in opened):
            return
        sessions_left = self.sessions - len(opened) - 1
        positions_left = self.positions - sum(held for _, held in opened) - positions
        if sessions_left < -(-self.sessions // KEPT_PARTS) or positions_left < self.positions // KEPT_PARTS:
            raise Overloaded(
                "what is left of this stage is kept for doors that have no session here",
                retry_after_s=RETRY_AFTER_S,
            )
