"""Who is alive: SWIM with Lifeguard.  PROTOCOL.md, section 15.

Pure: equal events, times and randomness give equal effects; no clock, no socket, no address.

Laws
- A claim counts by its subject's signature alone, and only its subject raises its incarnation.
- Nobody's "dead" is believed, or said.  A death is this node's own conclusion from a suspicion that nobody refuted in time.
- A suspicion counts only for the incarnation that this node holds a claim of, and only from an accuser that it believes
  alive; a refutation is a claim with a higher incarnation.
- What replays or comes twice changes nothing: a message that was handled before can cause an answer, never a change.
- A member is somebody whose claim a push-pull brought (`Synced`), so that its record was admitted; gossip about anybody
  else only asks for a push-pull.
- Everything that others can make grow has a limit in the profile.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from node.census import EMPTY, Census
from node.profile import LAN, Profile

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from node.claim import Claim, PeerHash, Sign, Suspicion, Verify
    from node.message import Message


class State(enum.IntEnum):
    """What this node believes of a peer."""

    ALIVE = 0
    SUSPECT = 1
    DEAD = 2
    LEFT = 3


class Refusal(enum.Enum):
    """Why something was not taken."""

    FULL = "the table has members_max members, and takes no stranger"
    FORGED = "a signature does not fit"
    STRANGER = "a message of a node that is no member"
    BUSY = "relays_max probes are under way for others"


# --- events -------------------------------------------------------------------------------------------------------


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


Event: TypeAlias = Tick | Received | Synced | RecordIssued | Leave | Forget


# --- effects ------------------------------------------------------------------------------------------------------


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


Effect: TypeAlias = Send | Sync | Changed | Forgotten | Refused


@dataclass(frozen=True, slots=True)
class Member:
    """One row of the table, as others read it."""

    claim: Claim
    state: State


class Membership:
    """The table of one node.  The node itself is no member of its own table."""

    __slots__ = ()

    def __init__(
        self,
        public_key: bytes,
        network: bytes,
        *,
        incarnation: int,
        sequence: int,
        sign: Sign,
        verify: Verify,
        random: random.Random,
        now: float,
        profile: Profile = LAN,
        census: Census = EMPTY,
    ) -> None:
        """`incarnation`: the wall clock in ms at the process's start, so that a restart outranks its past.  `now`: any
        clock that never goes back, in seconds.  `census`: members from the start, alive; it may hold this node's own
        claim, which is then taken for its own if incarnation and sequence agree."""
        raise NotImplementedError

    def handle(self, event: Event, now: float) -> list[Effect]:
        """State changes here and nowhere else.  Effects are in order of execution."""
        raise NotImplementedError

    @property
    def deadline(self) -> float | None:
        """When `handle(Tick(), now)` is due next."""
        raise NotImplementedError

    @property
    def peer(self) -> PeerHash:
        """This node."""
        raise NotImplementedError

    @property
    def claim(self) -> Claim:
        """This node's own, in force."""
        raise NotImplementedError

    @property
    def health(self) -> int:
        """Lifeguard's local health score: 0 is well; period and timeout are stretched 1 + health times."""
        raise NotImplementedError

    def __len__(self) -> int:
        """Members that are alive or suspect, and this node."""
        raise NotImplementedError

    def member(self, peer: PeerHash) -> Member | None:
        """None: a stranger, or this node itself."""
        raise NotImplementedError

    def members(self) -> Iterator[Member]:
        """All, tombstones too, in no order that means something."""
        raise NotImplementedError

    def differences(self) -> Iterator[tuple[PeerHash, Member | None]]:
        """Where this table is not its census: the cheap way to compare and check ten thousand of them.  None: forgotten."""
        raise NotImplementedError

    def suspicions(self) -> Iterator[Suspicion]:
        """Those in force, one for each accuser: what a push-pull takes along."""
        raise NotImplementedError
