"""A node's record: what it signs about itself.  PROTOCOL.md, section 14.

Pure: bytes in, verified state out; the clock is an argument.  Law: nobody signs for another, and nobody takes part in a
permissioned network without its operator's grant.  A record's bytes, everywhere, are those of a SignedRecord.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from google.protobuf.message import DecodeError

from node import address, expert_sets
from node import grant as grants
from node.identity import peer_id, verify
from node.network import open_network
from node.revocations import Revocations
from protos import peers_pb2 as pb
from protos.errors import (
    GrantMissing,
    InvalidGrant,
    InvalidRecord,
    InvalidRequest,
    RecordExpired,
    RecordFromFuture,
    RecordTooLarge,
)
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    LAYERS_MAX,
    NAME_CHARS_MAX,
    PUBLIC_KEY_BYTES,
    RECORD_ADDRESSES_MAX,
    RECORD_BYTES_MAX,
    RECORD_EXPERT_LAYERS_MAX,
    RECORD_HOLDINGS_MAX,
    RECORD_S_MAX,
    SIGNATURE_BYTES,
)
from protos.transcript import RECORD_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from node.identity import Identity
    from node.network import Network
    from protos.ids import PeerId

PROTOCOL = 1
_MODEL_ID_CHARS = 64
_SHA256_BYTES = 32


@dataclass(frozen=True, slots=True)
class Held:
    """The units of one model that a node serves.  `experts`: layer -> bitmask, bit e is expert e."""

    model_id: str
    text: bool = False
    span: range = range(0)
    embed: bool = False
    head: bool = False
    experts: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """Times are in milliseconds since 1970.  `certificate_sha256` None: plaintext.

    `network`: its id; `grant`: the operator's signed bytes, in a permissioned one.
    """

    public_key: bytes
    addresses: tuple[str, ...]
    certificate_sha256: bytes | None
    sequence: int
    issued_at_ms: int
    expires_at_ms: int
    zone: str = ""
    owner: str = ""
    version: str = ""
    protocol: int = PROTOCOL
    held: tuple[Held, ...] = ()
    sessions_max: int = 0
    kv_bytes_max: int = 0
    network: bytes = open_network().id
    grant: bytes = b""

    @property
    def peer(self) -> PeerId:
        return peer_id(self.public_key)

    @property
    def address(self) -> str:
        """The best one."""
        return self.addresses[0]


@dataclass(frozen=True, slots=True)
class Envelope:
    """A record as it came: of whom it claims to be is known, and nothing is verified."""

    content: bytes
    signature: bytes
    message: pb.Record

    @property
    def peer(self) -> PeerId:
        return peer_id(self.message.public_key)

    @property
    def signed(self) -> bytes:
        """Its bytes, without what others may have put around it."""
        made = pb.SignedRecord(record=self.content, signature=self.signature)
        return made.SerializeToString(deterministic=True)


def sign(record: Record, identity: Identity) -> bytes:
    """Raises RecordTooLarge for one that no receiver would take."""
    content = _message(record).SerializeToString(deterministic=True)
    signed = pb.SignedRecord(record=content, signature=identity.sign(RECORD_DOMAIN, content))
    data = signed.SerializeToString(deterministic=True)
    _check_size(data)
    return data


def read(data: bytes, now_ms: int, network: Network, revocations: Revocations | None = None) -> Record:
    """The record, checked as `opened` and then `verified` say."""
    return verified(opened(data), now_ms, network, revocations)


def opened(data: bytes) -> Envelope:
    """Checked in this order: size; protobuf; lengths of key and signature.  Raises InvalidRecord, RecordTooLarge."""
    _check_size(data)
    try:
        signed = pb.SignedRecord.FromString(data)
        message = pb.Record.FromString(signed.record)
    except DecodeError:
        _refuse("it is no record")
    if len(message.public_key) != PUBLIC_KEY_BYTES or len(signed.signature) != SIGNATURE_BYTES:
        _refuse("its key or its signature has not the length of one")
    return Envelope(signed.record, signed.signature, message)


def verified(envelope: Envelope, now_ms: int, network: Network, revocations: Revocations | None = None) -> Record:
    """The record, checked in this order: network; signature; times; fields; grant.

    Raises WrongNetwork, InvalidSignature, RecordFromFuture, RecordExpired, InvalidRecord, GrantMissing, GrantExpired,
    GrantRevoked, InvalidGrant.
    """
    message = envelope.message
    network.check(message.network, f"the record of {envelope.peer[:8]}")
    verify(message.public_key, envelope.signature, RECORD_DOMAIN, envelope.content)
    _check_times(message, now_ms)
    record = _checked(message)
    if network.permissioned:
        _check_grant(record, now_ms, network, revocations or Revocations())
    return record


def is_expired(record: Record, now_ms: int) -> bool:
    return record.expires_at_ms <= now_ms


def _check_size(data: bytes) -> None:
    if len(data) > RECORD_BYTES_MAX:
        raise RecordTooLarge(
            f"a node's record is refused: it has {len(data)} bytes; at most {RECORD_BYTES_MAX} are allowed"
        )


def _check_times(message: pb.Record, now_ms: int) -> None:
    who = peer_id(message.public_key)[:8]
    if message.issued_at_ms > now_ms + CLOCK_DIFFERENCE_S_MAX * 1000:
        ahead_s = (message.issued_at_ms - now_ms) / 1000
        raise RecordFromFuture(
            f"a node's record is refused: {who} issued it {ahead_s:.0f} s from now: one of the clocks is wrong"
        )
    if not message.issued_at_ms < message.expires_at_ms <= message.issued_at_ms + RECORD_S_MAX * 1000:
        _refuse(f"{who} says that it holds for no time, or for more than {RECORD_S_MAX} s")
    if message.expires_at_ms <= now_ms:
        past_s = (now_ms - message.expires_at_ms) / 1000
        raise RecordExpired(f"a node's record is refused: that of {who} expired {past_s:.0f} s ago")


def _check_grant(record: Record, now_ms: int, network: Network, revocations: Revocations) -> None:
    if not record.grant:
        raise GrantMissing(f"the record of {record.peer[:8]} has no grant, and network {str(network)[:12]} wants one")
    grant = grants.read(record.grant, network, now_ms)
    if grant.peer != record.peer:
        raise InvalidGrant(f"{record.peer[:8]} shows the grant of {grant.peer[:8]}")
    for name, wanted in (("zone", grant.zone), ("owner", grant.owner)):
        if wanted and getattr(record, name) != wanted:
            raise InvalidGrant(f"{record.peer[:8]} says {name} {getattr(record, name)!r}, and its grant {wanted!r}")
    if record.expires_at_ms > grant.expires_at_ms:
        raise InvalidGrant(f"the record of {record.peer[:8]} would outlive its grant")
    revocations.check(grant)


def _checked(message: pb.Record) -> Record:
    if not 1 <= len(message.addresses) <= RECORD_ADDRESSES_MAX:
        _refuse(f"it has {len(message.addresses)} addresses; 1 to {RECORD_ADDRESSES_MAX} are allowed")
    try:
        addresses = tuple(address.parse(text).host_port for text in message.addresses)
    except InvalidRequest as error:
        _refuse(error.message)
    if len(message.certificate_sha256) not in (0, _SHA256_BYTES):
        _refuse("its certificate_sha256 has not the length of one")
    for name in ("zone", "owner", "version"):
        if len(text := getattr(message, name)) > NAME_CHARS_MAX or not (text.isprintable() or not text):
            _refuse(f"its {name} is longer than {NAME_CHARS_MAX} characters, or not printable")
    if message.protocol < 1 or message.sequence < 1:
        _refuse("its protocol or its sequence is 0")
    return Record(
        public_key=message.public_key,
        addresses=addresses,
        certificate_sha256=message.certificate_sha256 or None,
        sequence=message.sequence,
        issued_at_ms=message.issued_at_ms,
        expires_at_ms=message.expires_at_ms,
        zone=message.zone,
        owner=message.owner,
        version=message.version,
        protocol=message.protocol,
        held=_holdings(message.holdings),
        sessions_max=message.sessions_max,
        kv_bytes_max=message.kv_bytes_max,
        network=message.network,
        grant=message.grant,
    )


def _holdings(messages: Iterable[pb.Holding]) -> tuple[Held, ...]:
    held = tuple(_holding(message) for message in itertools.islice(messages, RECORD_HOLDINGS_MAX + 1))
    if len(held) > RECORD_HOLDINGS_MAX or len({one.model_id for one in held}) < len(held):
        _refuse(f"it names a model twice, or more than {RECORD_HOLDINGS_MAX} models")
    # A few bytes may name many layers, and each costs memory.
    if sum(len(one.experts) for one in held) > RECORD_EXPERT_LAYERS_MAX:
        _refuse(f"it names more than {RECORD_EXPERT_LAYERS_MAX} layers with experts")
    return held


def _holding(message: pb.Holding) -> Held:
    if len(message.model_id) != _MODEL_ID_CHARS or not set(message.model_id) <= set("0123456789abcdef"):
        _refuse("it names a model by what is no model id")
    span = range(message.first_layer, message.first_layer + message.layers)
    if span.stop > LAYERS_MAX or (message.head and not span) or (message.embed and 0 not in span):
        _refuse("its span ends beyond the deepest model, or has an embed or a head where none belongs")
    experts = expert_sets.decode(message.experts)
    return Held(message.model_id, message.text, span, message.embed, message.head, experts)


def _message(record: Record) -> pb.Record:
    return pb.Record(
        public_key=record.public_key,
        addresses=record.addresses,
        certificate_sha256=record.certificate_sha256 or b"",
        zone=record.zone,
        owner=record.owner,
        version=record.version,
        protocol=record.protocol,
        sequence=record.sequence,
        issued_at_ms=record.issued_at_ms,
        expires_at_ms=record.expires_at_ms,
        holdings=[_holding_message(held) for held in record.held],
        sessions_max=record.sessions_max,
        kv_bytes_max=record.kv_bytes_max,
        network=record.network,
        grant=record.grant,
    )


def _holding_message(held: Held) -> pb.Holding:
    return pb.Holding(
        model_id=held.model_id,
        text=held.text,
        first_layer=held.span.start if held.span else 0,
        layers=len(held.span),
        embed=held.embed,
        head=held.head,
        experts=expert_sets.encode(held.experts),
    )


def _refuse(why: str) -> NoReturn:
    raise InvalidRecord(f"a node's record is refused: {why}")
