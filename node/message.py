"""What nodes say to each other by datagram: five messages, each with the gossip that rides on it.

Pure data.  Law: a message is answered by its nonce, and gossip is taken from any of them alike.  PROTOCOL.md, section 15.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

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
