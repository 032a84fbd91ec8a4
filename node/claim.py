"""Claims and suspicions: the signed words that gossip carries.  PROTOCOL.md, section 15.

Pure.  Law: a claim is its subject's own word, a suspicion its accuser's; both name the network they were made for.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NewType, TypeAlias

from protos.ids import PeerId
from protos.transcript import CLAIM_DOMAIN, SUSPICION_DOMAIN

PeerHash = NewType("PeerHash", bytes)
"""A node as gossip names it: the 32 bytes of its key's sha256, which a PeerId writes in base32."""

Sign: TypeAlias = Callable[[bytes, bytes], bytes]
"""(domain, message) -> 64 bytes: `Identity.sign`, or a cheap keyed hash in a simulation."""

Verify: TypeAlias = Callable[[bytes, bytes, bytes, bytes], None]
"""(public key, signature, domain, message); raises InvalidSignature: `identity.verify`, or its simulated twin."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What a node says about itself.  `incarnation` only its subject raises; `sequence` is that of its newest record.

    `left`: it has said good-bye, and is not dead.  `peer` follows from the key.
    """

    public_key: bytes
    incarnation: int
    sequence: int
    left: bool
    signature: bytes
    peer: PeerHash = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "peer", peer_hash(self.public_key))

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Of two claims of one subject the higher rank is in force; at equal incarnations `left` wins."""
        return (self.incarnation, self.left, self.sequence)


@dataclass(frozen=True, slots=True)
class Suspicion:
    """One node's word that `subject`, in that incarnation, does not answer.  `accuser` follows from the key."""

    subject: PeerHash
    incarnation: int
    accuser_key: bytes
    signature: bytes
    accuser: PeerHash = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "accuser", peer_hash(self.accuser_key))


Item: TypeAlias = Claim | Suspicion
"""What rides on a message."""


def peer_hash(public_key: bytes) -> PeerHash:
    return PeerHash(hashlib.sha256(public_key).digest())


def hash_of(peer: PeerId) -> PeerHash:
    """The 32 bytes behind a PeerId."""
    return PeerHash(base64.b32decode(peer.upper() + "=" * (-len(peer) % 8)))


def id_of(peer: PeerHash) -> PeerId:
    """What people and records call that peer."""
    return PeerId(base64.b32encode(peer).decode("ascii").rstrip("=").lower())


def sign_claim(
    sign: Sign, network: bytes, public_key: bytes, incarnation: int, sequence: int, *, left: bool = False
) -> Claim:
    message = _claim_bytes(network, peer_hash(public_key), incarnation, sequence, left)
    return Claim(public_key, incarnation, sequence, left, sign(CLAIM_DOMAIN, message))


def sign_suspicion(sign: Sign, network: bytes, subject: PeerHash, incarnation: int, accuser_key: bytes) -> Suspicion:
    message = _suspicion_bytes(network, subject, incarnation, peer_hash(accuser_key))
    return Suspicion(subject, incarnation, accuser_key, sign(SUSPICION_DOMAIN, message))


def verify_item(verify: Verify, network: bytes, item: Item) -> None:
    """Raises InvalidSignature: its signer never said this in this network."""
    if isinstance(item, Claim):
        message = _claim_bytes(network, item.peer, item.incarnation, item.sequence, item.left)
        verify(item.public_key, item.signature, CLAIM_DOMAIN, message)
    else:
        message = _suspicion_bytes(network, item.subject, item.incarnation, item.accuser)
        verify(item.accuser_key, item.signature, SUSPICION_DOMAIN, message)


def encoded_bytes(item: Item) -> int:
    """What it takes in a datagram, with tag and length.  A field has a tag of one byte, a key a length of one."""
    if isinstance(item, Claim):
        content = 34 + _number_bytes(item.incarnation) + _number_bytes(item.sequence) + 2 * item.left + 66
    else:
        content = 34 + _number_bytes(item.incarnation) + 34 + 66
    return 1 + _varint_bytes(content) + content


def _claim_bytes(network: bytes, peer: PeerHash, incarnation: int, sequence: int, left: bool) -> bytes:
    numbers = incarnation.to_bytes(8, "little") + sequence.to_bytes(8, "little")
    return network + peer + numbers + bytes((left,))


def _suspicion_bytes(network: bytes, subject: PeerHash, incarnation: int, accuser: PeerHash) -> bytes:
    return network + subject + incarnation.to_bytes(8, "little") + accuser


def _number_bytes(number: int) -> int:
    """A uint64 field; protobuf leaves out a zero."""
    return 1 + _varint_bytes(number) if number else 0


def _varint_bytes(number: int) -> int:
    return max(1, (number.bit_length() + 6) // 7)
