"""What membership wants done, and what it has concluded: the effects that `Membership.handle` gives.

Pure data.  Law: an effect asks for no answer; what comes of it, if anything, is an event of its own.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from node.claim import Claim, PeerHash
    from node.member import State
    from node.message import Message


class Refusal(enum.Enum):
    """Why something was not taken."""

    FULL = "the table has members_max members, and takes no stranger"
    FORGED = "a signature does not fit"
    STRANGER = "a message of a node that is no member"
    BUSY = "relays_max probes are under way for others"


@dataclass(frozen=True, slots=True)
class Send:
    """A datagram, to the address in the record of `to`; without one it is dropped."""

    to: PeerHash
    message: Message


@dataclass(frozen=True, slots=True)
class Sync:
    """Do a push-pull with `peer`, and handle `Synced` with what it brings; if it fails, nothing.

    A stranger has no record here: its address is where its datagram came from, or the effect is dropped.
    """

    peer: PeerHash


@dataclass(frozen=True, slots=True)
class Changed:
    """This node believes something else of `peer`.  `before` None: it is new.  `claim` is its newest one; a new claim
    (a higher incarnation or sequence) is a change too, with `before` equal to `after`."""

    peer: PeerHash
    before: State | None
    after: State
    incarnation: int
    claim: Claim


@dataclass(frozen=True, slots=True)
class Forgotten:
    """`peer` is no member any more, and no tombstone."""

    peer: PeerHash


@dataclass(frozen=True, slots=True)
class Refused:
    """Something of `peer` (for FORGED: that `peer` sent) was not taken.  At most one for each event and reason."""

    peer: PeerHash
    reason: Refusal


@dataclass(frozen=True, slots=True)
class Answered:
    """`peer` answered this node's own ping: a round trip, as this node's driver saw it."""

    peer: PeerHash
    rtt_s: float


Effect: TypeAlias = Send | Sync | Changed | Forgotten | Refused | Answered
