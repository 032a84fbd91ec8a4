"""What nodes say to each other by datagram: five messages, each with the gossip that rides on it.

Pure data.  Law: a message is answered by its nonce, and gossip is taken from all alike.  PROTOCOL.md, section 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from protos.limits import DATAGRAM_BYTES_MAX

if TYPE_CHECKING:
    from node.claim import Item, PeerHash


@dataclass(frozen=True, slots=True)
class Ping:
    """Answer me: an Ack with this nonce."""

    nonce: int
    gossip: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class PingRequest:
    """Ping `target` for me: an Ack with my nonce if it answers you, a Nack if it does not in time."""

    nonce: int
    target: PeerHash
    gossip: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Ack:
    """I, or the target that you asked about, live."""

    nonce: int
    gossip: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Nack:
    """I live and did ask; the target has not answered me."""

    nonce: int
    gossip: tuple[Item, ...] = ()


@dataclass(frozen=True, slots=True)
class Gossip:
    """News only; nobody answers it."""

    gossip: tuple[Item, ...] = ()


Message: TypeAlias = Ping | PingRequest | Ack | Nack | Gossip

_BODY_FIELDS = 34 + 34 + 2 + 9  # network, receiver, kind, nonce
_ENVELOPE = 3 + 34 + 66  # the body's tag and length, key, signature
TARGET_BYTES: Final = 34
"""What the target of a PingRequest takes."""

GOSSIP_ROOM_BYTES: Final = DATAGRAM_BYTES_MAX - _ENVELOPE - _BODY_FIELDS
"""What a message without a target has for items, each of `claim.encoded_bytes`."""
