"""Grant: an operator lets a peer into its network until a day.  PROTOCOL.md, section 16.

Pure: bytes in, verified state out; the clock is an argument.  Law: only the operator gives, and what it gave ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from node import operator_signed
from node.identity import peer_bytes
from node.operator_signed import check_name, refuse
from protos import peers_pb2 as pb
from protos.errors import GrantExpired
from protos.limits import CLOCK_DIFFERENCE_S_MAX, GRANT_BYTES_MAX, GRANT_S_MAX
from protos.transcript import GRANT_DOMAIN

if TYPE_CHECKING:
    from node.identity import Identity
    from node.network import Network
    from protos.ids import PeerId

_WHAT: Final = "a grant"


@dataclass(frozen=True, slots=True)
class Grant:
    """Times are in milliseconds since 1970.  `zone`, `owner`: what the peer's record must say; empty: anything."""

    peer: PeerId
    issued_at_ms: int
    expires_at_ms: int
    zone: str = ""
    owner: str = ""


def sign(grant: Grant, operator: Identity) -> bytes:
    """Raises InvalidGrant for one that nobody would take."""
    _check(grant)
    content = pb.Grant(
        peer=peer_bytes(grant.peer),
        issued_at_ms=grant.issued_at_ms,
        expires_at_ms=grant.expires_at_ms,
        zone=grant.zone,
        owner=grant.owner,
    ).SerializeToString(deterministic=True)
    return operator_signed.write(content, GRANT_DOMAIN, operator)


def read(data: bytes, network: Network | None, now_ms: int) -> Grant:
    """What was granted, checked in this order: as operator_signed.read; protobuf; fields; times.

    `network` None: whichever it is of.  Raises InvalidGrant, WrongNetwork, InvalidSignature, GrantExpired.
    """
    content = operator_signed.read(data, GRANT_DOMAIN, network, _WHAT, GRANT_BYTES_MAX)
    try:
        message = pb.Grant.FromString(content)
    except DecodeError:
        refuse(_WHAT, "what was signed is none")
    peer = operator_signed.peer(message.peer, _WHAT)
    grant = Grant(peer, message.issued_at_ms, message.expires_at_ms, message.zone, message.owner)
    _check(grant)
    if grant.issued_at_ms > now_ms + CLOCK_DIFFERENCE_S_MAX * 1000:
        refuse(_WHAT, f"it was given {(grant.issued_at_ms - now_ms) / 1000:.0f} s from now: a clock is wrong")
    if grant.expires_at_ms <= now_ms:
        raise GrantExpired(
            f"the grant of {peer[:8]} expired {(now_ms - grant.expires_at_ms) / 1000:.0f} s ago: the operator must "
            "give another ('shoal network grant')"
        )
    return grant


def _check(grant: Grant) -> None:
    for field in ("zone", "owner"):
        check_name(getattr(grant, field), field, _WHAT)
    if not 0 < grant.issued_at_ms < grant.expires_at_ms <= grant.issued_at_ms + GRANT_S_MAX * 1000:
        refuse(_WHAT, f"it holds for no time, or for more than {GRANT_S_MAX // 86_400} days")
