"""What membership is told: the events that `Membership.handle` takes.

Pure data.  Law: an event says what happened here, once; when, and what follows from it, is for `handle` to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from node.claim import Claim, PeerHash, Suspicion
    from node.message import Message


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: handle it when `deadline` is reached.  Earlier or later is harmless."""


@dataclass(frozen=True, slots=True)
class Received:
    """A datagram whose signature fits `sender`, which was addressed to this node in this network."""

    sender: PeerHash
    message: Message


@dataclass(frozen=True, slots=True)
class Synced:
    """What a push-pull with `peer` brought, whichever side began it.  Records first: the driver leaves out claims of
    peers whose records its routing table has refused, or does not have."""

    peer: PeerHash
    claims: tuple[Claim, ...] = ()
    suspicions: tuple[Suspicion, ...] = ()


@dataclass(frozen=True, slots=True)
class RecordIssued:
    """This node has a new record, with that (higher) sequence."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Leave:
    """This node says good-bye.  From then on it probes nobody; when `deadline` is None, all has been said."""


@dataclass(frozen=True, slots=True)
class Forget:
    """The record of `peer` has expired or was revoked: it is no member any more, whatever its state."""

    peer: PeerHash


@dataclass(frozen=True, slots=True)
class Doubt:
    """A call to `peer` failed: it is probed next, ahead of its turn.  What that probe comes to is all that counts."""

    peer: PeerHash


@dataclass(frozen=True, slots=True)
class Greet:
    """Ping `peer`, whom this node has not heard at its address.  An answer gives `Answered`; silence means nothing."""

    peer: PeerHash


@dataclass(frozen=True, slots=True)
class Deaf:
    """Whether no answer reaches this node, because nobody can call it.  Then its probes would say that all others are
    dead: it probes and accuses nobody, and goes by what push-pulls bring."""

    deaf: bool


Event: TypeAlias = Tick | Received | Synced | RecordIssued | Leave | Forget | Doubt | Greet | Deaf
