"""Datagrams: a message between two nodes, signed, as bytes.  PROTOCOL.md, section 15.

Pure: bytes in, a verified message out.  Law: the cheap checks come first and the signature last, so that bytes of no
use cost microseconds; what a datagram says counts only for its receiver, in its network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from google.protobuf.message import DecodeError

from node.claim import Claim, PeerHash, Suspicion, peer_hash
from node.message import Ack, Gossip, Message, Nack, Ping, PingRequest
from protos import gossip_pb2 as pb
from protos.errors import BrokenInvariant, InvalidDatagram, WrongNetwork, WrongPeer
from protos.limits import (
    DATAGRAM_BYTES_MAX,
    GOSSIP_ITEMS_MAX,
    INCARNATION_MAX,
    LOAD_BYTES_MAX,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
)
from protos.transcript import DATAGRAM_DOMAIN

if TYPE_CHECKING:
    from node.claim import Item, Sign, Verify

_HASH_BYTES = 32
_LOAD_FIELD_BYTES = 3  # its tag and its length
_ENVELOPE_BYTES = 3 + (2 + PUBLIC_KEY_BYTES) + (2 + SIGNATURE_BYTES)  # the body's tag and length, key, signature

_KINDS: dict[type[Message], pb.GossipKind.ValueType] = {
    Ping: pb.GOSSIP_KIND_PING,
    PingRequest: pb.GOSSIP_KIND_PING_REQUEST,
    Ack: pb.GOSSIP_KIND_ACK,
    Nack: pb.GOSSIP_KIND_NACK,
    Gossip: pb.GOSSIP_KIND_NEWS,
}


@dataclass(frozen=True, slots=True)
class Datagram:
    """One that was read: who signed it, and what it says."""

    public_key: bytes
    sender: PeerHash
    message: Message
    load: bytes = b""  # the sender's SignedLoad, not looked at; empty: it says nothing of it


def write(message: Message, to: PeerHash, network: bytes, public_key: bytes, sign: Sign, load: bytes = b"") -> bytes:
    """Its bytes.  Claims go before suspicions; `load` rides where it fits.

    Raises BrokenInvariant for more gossip than fits, which nobody gave.
    """
    made = pb.DatagramBody(
        network=network,
        to=to,
        kind=_KINDS[type(message)],
        nonce=0 if isinstance(message, Gossip) else message.nonce,
        target=message.target if isinstance(message, PingRequest) else b"",
        claims=[claim_message(item) for item in message.gossip if isinstance(item, Claim)],
        suspicions=[suspicion_message(item) for item in message.gossip if isinstance(item, Suspicion)],
    )
    if load and made.ByteSize() + len(load) + _LOAD_FIELD_BYTES <= DATAGRAM_BYTES_MAX - _ENVELOPE_BYTES:
        made.load = load
    body = made.SerializeToString(deterministic=True)
    signed = pb.Datagram(body=body, public_key=public_key, signature=sign(DATAGRAM_DOMAIN, body))
    data = signed.SerializeToString(deterministic=True)
    if len(data) > DATAGRAM_BYTES_MAX:
        raise BrokenInvariant(f"a datagram of {len(data)} bytes was made; at most {DATAGRAM_BYTES_MAX} are allowed")
    return data


def read(data: bytes, me: PeerHash, network: bytes, verify: Verify) -> Datagram:
    """The datagram, checked in this order: size; protobuf; lengths and fields; network; receiver; signature.

    The signatures of the claims and suspicions in it are not looked at: membership verifies those that are news.
    Raises InvalidDatagram, WrongNetwork, WrongPeer, InvalidSignature.
    """
    if len(data) > DATAGRAM_BYTES_MAX:
        _refuse(f"it has {len(data)} bytes; at most {DATAGRAM_BYTES_MAX} are allowed")
    try:
        signed = pb.Datagram.FromString(data)
        body = pb.DatagramBody.FromString(signed.body)
    except DecodeError:
        _refuse("it is none")
    _check_lengths(signed, body)
    _check_kind(body)
    if body.network != network:
        raise WrongNetwork("a datagram is refused: it was made for another network")
    if body.to != me:
        raise WrongPeer("a datagram is refused: it was made for another node")
    verify(signed.public_key, signed.signature, DATAGRAM_DOMAIN, signed.body)
    return Datagram(signed.public_key, peer_hash(signed.public_key), _message(body), body.load)


def claim_message(claim: Claim) -> pb.Claim:
    return pb.Claim(
        public_key=claim.public_key,
        incarnation=claim.incarnation,
        sequence=claim.sequence,
        left=claim.left,
        signature=claim.signature,
    )


def suspicion_message(suspicion: Suspicion) -> pb.Suspicion:
    return pb.Suspicion(
        subject=suspicion.subject,
        incarnation=suspicion.incarnation,
        accuser_key=suspicion.accuser_key,
        signature=suspicion.signature,
    )


def claim_in(message: pb.Claim) -> Claim:
    """The claim of a datagram or a push-pull; its signature is not verified here.  Raises InvalidDatagram."""
    _check_claim(message)
    return Claim(message.public_key, message.incarnation, message.sequence, message.left, message.signature)


def suspicion_in(message: pb.Suspicion) -> Suspicion:
    """The same, of a suspicion."""
    _check_suspicion(message)
    return Suspicion(PeerHash(message.subject), message.incarnation, message.accuser_key, message.signature)


def parse_claim(data: bytes) -> Claim:
    """A claim's bytes, as a push-pull carries them.  Raises InvalidDatagram."""
    try:
        return claim_in(pb.Claim.FromString(data))
    except DecodeError:
        _refuse("what should be a claim is none")


def parse_suspicion(data: bytes) -> Suspicion:
    """The same, of a suspicion."""
    try:
        return suspicion_in(pb.Suspicion.FromString(data))
    except DecodeError:
        _refuse("what should be a suspicion is none")


def _check_lengths(signed: pb.Datagram, body: pb.DatagramBody) -> None:
    if len(signed.public_key) != PUBLIC_KEY_BYTES or len(signed.signature) != SIGNATURE_BYTES:
        _refuse("its key or its signature has not the length of one")
    if len(body.network) != _HASH_BYTES or len(body.to) != _HASH_BYTES:
        _refuse("its network or its receiver has not the length of one")
    if len(body.load) > LOAD_BYTES_MAX:
        _refuse("its load report is longer than one can be")
    if len(body.claims) + len(body.suspicions) > GOSSIP_ITEMS_MAX:
        _refuse(f"it has more than {GOSSIP_ITEMS_MAX} claims and suspicions")
    for claim in body.claims:
        _check_claim(claim)
    for suspicion in body.suspicions:
        _check_suspicion(suspicion)


def _check_kind(body: pb.DatagramBody) -> None:
    if body.kind not in _KINDS.values():
        _refuse("it is of no kind that is known here")
    if len(body.target) != (_HASH_BYTES if body.kind == pb.GOSSIP_KIND_PING_REQUEST else 0):
        _refuse("it names a target where none belongs, or none where one must be")
    if body.kind == pb.GOSSIP_KIND_NEWS and body.nonce:
        _refuse("it has a nonce, and asks nothing")


def _check_claim(claim: pb.Claim) -> None:
    if len(claim.public_key) != PUBLIC_KEY_BYTES or len(claim.signature) != SIGNATURE_BYTES:
        _refuse("a claim's key or signature has not the length of one")
    if claim.incarnation > INCARNATION_MAX:
        _refuse("a claim's incarnation is beyond all times")


def _check_suspicion(suspicion: pb.Suspicion) -> None:
    if len(suspicion.subject) != _HASH_BYTES:
        _refuse("a suspicion's subject has not the length of one")
    if len(suspicion.accuser_key) != PUBLIC_KEY_BYTES or len(suspicion.signature) != SIGNATURE_BYTES:
        _refuse("a suspicion's key or signature has not the length of one")
    if suspicion.incarnation > INCARNATION_MAX:
        _refuse("a suspicion's incarnation is beyond all times")


def _message(body: pb.DatagramBody) -> Message:
    gossip: tuple[Item, ...] = (*map(claim_in, body.claims), *map(suspicion_in, body.suspicions))
    if body.kind == pb.GOSSIP_KIND_PING:
        return Ping(body.nonce, gossip)
    if body.kind == pb.GOSSIP_KIND_PING_REQUEST:
        return PingRequest(body.nonce, PeerHash(body.target), gossip)
    if body.kind == pb.GOSSIP_KIND_ACK:
        return Ack(body.nonce, gossip)
    if body.kind == pb.GOSSIP_KIND_NACK:
        return Nack(body.nonce, gossip)
    return Gossip(gossip)


def _refuse(why: str) -> NoReturn:
    raise InvalidDatagram(f"a datagram is refused: {why}")
