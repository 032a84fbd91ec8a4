"""Revocations: the operator's versioned list of grants that hold no more.  PROTOCOL.md, section 16.

Pure: bytes in, verified state out.  Law: a list only grows newer; the highest version that was seen stays in force.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from node import operator_signed
from node.identity import peer_bytes
from node.operator_signed import refuse
from protos import peers_pb2 as pb
from protos.errors import Equivocation, GrantRevoked
from protos.limits import CLOCK_DIFFERENCE_S_MAX, GRANT_S_MAX, REVOCATIONS_BYTES_MAX, REVOCATIONS_MAX
from protos.transcript import REVOCATIONS_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from node.grant import Grant
    from node.identity import Identity
    from node.network import Network
    from protos.ids import PeerId

_WHAT: Final = "a revocation list"


@dataclass(frozen=True, slots=True)
class Revocations:
    """`at_ms`: by peer, since 1970: what it was granted up to then is void.  Version 0: nothing was revoked yet."""

    version: int = 0
    issued_at_ms: int = 0
    at_ms: Mapping[PeerId, int] = field(default_factory=dict)

    def check(self, grant: Grant) -> None:
        """Raises GrantRevoked."""
        if grant.issued_at_ms <= self.at_ms.get(grant.peer, 0):
            raise GrantRevoked(f"the operator took back the grant of {grant.peer[:8]} (list {self.version})")

    def next(self, peer: PeerId, now_ms: int) -> Revocations:
        """With one more; without those of which every grant has expired by now."""
        kept = {one: at_ms for one, at_ms in self.at_ms.items() if at_ms + GRANT_S_MAX * 1000 > now_ms}
        return Revocations(self.version + 1, now_ms, kept | {peer: now_ms})


@dataclass(frozen=True, slots=True)
class Newer:
    """In force now."""

    revocations: Revocations


@dataclass(frozen=True, slots=True)
class Same:
    """To the byte what is in force already."""


@dataclass(frozen=True, slots=True)
class Older:
    """A newer one is in force, and stays."""

    version: int


Outcome = Newer | Same | Older


class RevocationList:
    """The list in force of one permissioned network."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._signed = b""
        self.revocations = Revocations()

    @property
    def signed(self) -> bytes:
        """As it was received, for passing on and for keeping; empty: there is none."""
        return self._signed

    def merge(self, data: bytes, now_ms: int) -> Outcome:
        """Raises InvalidGrant, WrongNetwork, InvalidSignature, Equivocation; then nothing has changed."""
        if self._signed and data == self._signed:
            return Same()
        found = read(data, self._network, now_ms)
        if found.version < self.revocations.version:
            return Older(found.version)
        if found.version == self.revocations.version:
            if found == self.revocations:
                return Same()
            raise Equivocation(f"the operator signed two different revocation lists with version {found.version}")
        self._signed = data
        self.revocations = found
        return Newer(found)


def sign(revocations: Revocations, operator: Identity) -> bytes:
    """Raises InvalidGrant for one that nobody would take."""
    _check(revocations.version, len(revocations.at_ms))
    entries = sorted((peer_bytes(peer), at_ms) for peer, at_ms in revocations.at_ms.items())
    content = pb.Revocations(
        version=revocations.version,
        issued_at_ms=revocations.issued_at_ms,
        revocations=[pb.Revocation(peer=peer, at_ms=at_ms) for peer, at_ms in entries],
    ).SerializeToString(deterministic=True)
    return operator_signed.write(content, REVOCATIONS_DOMAIN, operator)


def read(data: bytes, network: Network | None, now_ms: int) -> Revocations:
    """Checked in this order: as operator_signed.read; protobuf; fields; time.

    `network` None: whichever it is of.  Raises InvalidGrant, WrongNetwork, InvalidSignature.
    """
    content = operator_signed.read(data, REVOCATIONS_DOMAIN, network, _WHAT, REVOCATIONS_BYTES_MAX)
    try:
        message = pb.Revocations.FromString(content)
    except DecodeError:
        refuse(_WHAT, "what was signed is none")
    _check(message.version, len(message.revocations))
    raw = [one.peer for one in message.revocations]
    if any(a >= b for a, b in itertools.pairwise(raw)):
        refuse(_WHAT, "its peers are not in ascending order, each once")
    if message.issued_at_ms > now_ms + CLOCK_DIFFERENCE_S_MAX * 1000:
        refuse(_WHAT, f"it was issued {(message.issued_at_ms - now_ms) / 1000:.0f} s from now: a clock is wrong")
    at_ms = {operator_signed.peer(one.peer, _WHAT): one.at_ms for one in message.revocations}
    return Revocations(message.version, message.issued_at_ms, at_ms)


def _check(version: int, count: int) -> None:
    if version < 1:
        refuse(_WHAT, "its version is 0")
    if count > REVOCATIONS_MAX:
        refuse(_WHAT, f"it names {count} peers; at most {REVOCATIONS_MAX} are allowed")
