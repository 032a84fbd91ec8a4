"""A member: one row of the table of who is alive.

Pure data.  Law: a row is replaced, never changed, so that many tables may share it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from node.claim import Claim


class State(enum.IntEnum):
    """What a node believes of a peer.  `LEFT` is the peer's own word, `DEAD` this node's conclusion."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


@dataclass(frozen=True, slots=True)
class Member:
    """`claim` is the newest one of that peer."""

    claim: Claim
    state: State

    @property
    def active(self) -> bool:
        """It is probed, and counts as one of the members that there are."""
        return self.state <= State.SUSPECT
