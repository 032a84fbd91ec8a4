"""A node's record: what it signs about itself.  PROTOCOL.md, section 14.

Pure: bytes in, verified state out; the clock is an argument.  Law: nobody signs for another.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from google.protobuf.message import DecodeError

from node import address
from node.identity import Identity, peer_id, verify
from protos import peers_pb2 as pb
from protos.errors import InvalidRecord, InvalidRequest
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    NAME_CHARS_MAX,
    PUBLIC_KEY_BYTES,
    RECORD_ADDRESSES_MAX,
    RECORD_BYTES_MAX,
    RECORD_HOLDINGS_MAX,
    RECORD_S_MAX,
    SIGNATURE_BYTES,
)
from protos.transcript import RECORD_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

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
    """Times are in milliseconds since 1970.  `certificate_sha256` None: plaintext."""

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

    @property
    def peer(self) -> PeerId:
        return peer_id(self.public_key)

    @property
    def address(self) -> str:
        """The best one."""
        return self.addresses[0]


def sign(record: Record, identity: Identity) -> pb.SignedRecord:
    """Raises InvalidRecord for one that no receiver would take for its size."""
    encoded = _message(record).SerializeToString(deterministic=True)
    if len(encoded) > RECORD_BYTES_MAX:
        _refuse(f"it has {len(encoded)} bytes; at most {RECORD_BYTES_MAX} are allowed")
    return pb.SignedRecord(record=encoded, signature=identity.sign(RECORD_DOMAIN, encoded))


def read(signed: pb.SignedRecord, now_ms: int) -> Record:
    """The record, checked in this order: size; protobuf; key; signature; times; everything else.

    Raises InvalidRecord, InvalidSignature.
    """
    if len(signed.record) > RECORD_BYTES_MAX:
        _refuse(f"it has {len(signed.record)} bytes; at most {RECORD_BYTES_MAX} are allowed")
    try:
        message = pb.Record.FromString(signed.record)
    except DecodeError:
        _refuse("it is no record")
    if len(message.public_key) != PUBLIC_KEY_BYTES or len(signed.signature) != SIGNATURE_BYTES:
        _refuse("its key or its signature has not the length of one")
    verify(message.public_key, signed.signature, RECORD_DOMAIN, signed.record)
    _check_times(message, now_ms)
    return _checked(message)


def is_expired(record: Record, now_ms: int) -> bool:
    return record.expires_at_ms <= now_ms


def _check_times(message: pb.Record, now_ms: int) -> None:
    who = peer_id(message.public_key)[:8]
    if message.issued_at_ms > now_ms + CLOCK_DIFFERENCE_S_MAX * 1000:
        _refuse(f"{who} issued it {(message.issued_at_ms - now_ms) / 1000:.0f} s from now: one of the clocks is wrong")
    if not message.issued_at_ms < message.expires_at_ms <= message.issued_at_ms + RECORD_S_MAX * 1000:
        _refuse(f"{who} says that it holds for no time, or for more than {RECORD_S_MAX} s")
    if message.expires_at_ms <= now_ms:
        _refuse(f"that of {who} expired {(now_ms - message.expires_at_ms) / 1000:.0f} s ago")


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
    )


def _holdings(messages: Iterable[pb.Holding]) -> tuple[Held, ...]:
    held = tuple(_holding(message) for message in itertools.islice(messages, RECORD_HOLDINGS_MAX + 1))
    if len(held) > RECORD_HOLDINGS_MAX or len({one.model_id for one in held}) < len(held):
        _refuse(f"it names a model twice, or more than {RECORD_HOLDINGS_MAX} models")
    return held


def _holding(message: pb.Holding) -> Held:
    if len(message.model_id) != _MODEL_ID_CHARS or not set(message.model_id) <= set("0123456789abcdef"):
        _refuse("it names a model by what is no model id")
    span = range(message.first_layer, message.first_layer + message.layers)
    if span.stop > LAYERS_MAX or (message.head and not span) or (message.embed and 0 not in span):
        _refuse("its span ends beyond the deepest model, or has an embed or a head where none belongs")
    experts: dict[int, int] = {}
    for group in message.experts:
        _add_experts(experts, group)
    return Held(message.model_id, message.text, span, message.embed, message.head, experts)


def _add_experts(experts: dict[int, int], group: pb.ExpertSet) -> None:
    layers = range(group.first_layer, group.first_layer + group.layers)
    if not layers or layers.stop > LAYERS_MAX or len(group.bits) > EXPERTS_MAX // 8:
        _refuse(f"its experts are of no layer, or beyond {LAYERS_MAX} layers or {EXPERTS_MAX} experts")
    mask = int.from_bytes(group.bits, "little")
    for layer in layers:
        if layer in experts:
            _refuse(f"it names the experts of layer {layer} twice")
        experts[layer] = mask


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
    )


def _holding_message(held: Held) -> pb.Holding:
    return pb.Holding(
        model_id=held.model_id,
        text=held.text,
        first_layer=held.span.start if held.span else 0,
        layers=len(held.span),
        embed=held.embed,
        head=held.head,
        experts=_expert_sets(held.experts),
    )


def _expert_sets(experts: Mapping[int, int]) -> list[pb.ExpertSet]:
    """Consecutive layers with the same experts go together."""
    sets: list[pb.ExpertSet] = []
    for layer, mask in sorted(experts.items()):
        bits = mask.to_bytes((mask.bit_length() + 7) // 8, "little")
        if not mask:
            continue
        if sets and sets[-1].bits == bits and sets[-1].first_layer + sets[-1].layers == layer:
            sets[-1].layers += 1
        else:
            sets.append(pb.ExpertSet(first_layer=layer, layers=1, bits=bits))
    return sets


def _refuse(why: str) -> NoReturn:
    raise InvalidRecord(f"a node's record is refused: {why}")
