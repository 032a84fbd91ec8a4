"""What a signed record says, for people and programs: who, what, when, and what is wrong with it.

Pure: bytes in, facts out; the clock is an argument.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from node import operator_signed
from node import record as records
from node.network import Network, open_network
from node.show import size
from protos import peers_pb2 as pb
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.record import Envelope, Held, Record


@dataclass(frozen=True, slots=True)
class Examined:
    """`problem`: why nobody would take it now; None: it holds.  `record`: None if nothing in it may be believed.

    `network`: which it says it is of.  `unsigned_bytes`: of what came beside the signed `bytes`, and is worth nothing.
    """

    envelope: Envelope
    network: Network
    record: Record | None
    problem: ShoalError | None
    bytes: int
    unsigned_bytes: int


def examine(data: bytes, now_ms: int, network: Network | None = None) -> Examined:
    """`network` None: whichever it says it is of.  Raises InvalidRecord for what is no record at all."""
    envelope = records.opened(data)
    tried = network or _claimed(envelope)
    stated = tried if tried.id == envelope.message.network else _stated(envelope)
    size = len(envelope.signed)
    try:
        record = records.verified(envelope, now_ms, tried)
    except ShoalError as problem:
        return Examined(envelope, stated, None, problem, size, len(data) - size)
    return Examined(envelope, stated, record, None, size, len(data) - size)


def facts(found: Examined) -> dict[str, Any]:
    """As one JSON object.  What nobody verified is left out."""
    message = found.envelope.message
    plain: dict[str, Any] = {
        "peer": found.envelope.peer,
        "network": str(found.network),
        "valid": found.problem is None,
        "problem": None if found.problem is None else {"code": found.problem.code, "message": found.problem.message},
        "bytes": found.bytes,
        "unsigned_bytes": found.unsigned_bytes,
        "sequence": message.sequence,
        "issued_at": _time(message.issued_at_ms),
        "expires_at": _time(message.expires_at_ms),
    }
    record = found.record
    if record is None:
        return plain
    return plain | {
        "addresses": list(record.addresses),
        "certificate_sha256": record.certificate_sha256.hex() if record.certificate_sha256 else None,
        "zone": record.zone,
        "owner": record.owner,
        "version": record.version,
        "protocol": record.protocol,
        "sessions_max": record.sessions_max,
        "kv_bytes_max": record.kv_bytes_max,
        "granted_until": _granted_until(record),
        "models": [_model(held) for held in record.held],
    }


def lines(found: Examined) -> Iterator[tuple[str, str]]:
    """Name and text, for people.  Nothing here is what a terminal obeys."""
    message = found.envelope.message
    yield "peer", found.envelope.peer
    yield "network", f"{found.network} ({'permissioned' if found.network.permissioned else 'open'})"
    yield "sequence", str(message.sequence)
    yield "issued", _time(message.issued_at_ms)
    yield "expires", _time(message.expires_at_ms)
    yield "size", f"{found.bytes} bytes"
    if (record := found.record) is None:
        return
    yield "address", ", ".join(record.addresses)
    yield "certificate", record.certificate_sha256.hex() if record.certificate_sha256 else "none: plaintext"
    for name in ("zone", "owner", "version"):
        if text := getattr(record, name):
            yield name, text
    yield "capacity", f"{record.sessions_max} answers, {size(record.kv_bytes_max)} of KV"
    if until := _granted_until(record):
        yield "granted until", until
    for held in record.held:
        yield "holds", _sentence(held)


def _claimed(envelope: Envelope) -> Network:
    """The one that it is to be verified with: that of its grant, or else the one that it names."""
    grant = envelope.message.grant
    return operator_signed.network_of(grant) if grant else _stated(envelope)


def _stated(envelope: Envelope) -> Network:
    """Of most open ones only the id is known."""
    message = envelope.message
    default = open_network()
    if message.network == default.id:
        return default
    return Network(message.network, name="" if message.grant else message.network.hex() or "none")


def _granted_until(record: Record) -> str | None:
    """Verified with the record."""
    if not record.grant:
        return None
    return _time(pb.Grant.FromString(pb.OperatorSigned.FromString(record.grant).content).expires_at_ms)


def _model(held: Held) -> dict[str, Any]:
    return {
        "model": held.model_id,
        "text": held.text,
        "first_layer": held.span.start,
        "layers": len(held.span),
        "embed": held.embed,
        "head": held.head,
        "experts": sum(mask.bit_count() for mask in held.experts.values()),
        "expert_layers": len(held.experts),
    }


def _sentence(held: Held) -> str:
    experts = sum(mask.bit_count() for mask in held.experts.values())
    parts = [
        *(["text"] if held.text else []),
        *(["embed"] if held.embed else []),
        *([f"trunk of layers {held.span.start} to {held.span.stop - 1}"] if held.span else []),
        *(["head"] if held.head else []),
        *([f"{experts} experts in {len(held.experts)} layers"] if experts else []),
    ]
    return f"of model {held.model_id[:12]}: {', '.join(parts) or 'nothing'}"


def _time(ms: int) -> str:
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):
        return f"{ms} ms after 1970"
