"""PushPull: what a push-pull's messages say of records, claims, suspicions and load, and what is taken from them.

Blocks on no network.  PROTOCOL.md, section 17.  Laws: records are taken before claims, and a claim counts only where
its peer's record is known, so that nobody is a member of whom nothing is known.  A record that is refused keeps no
other out; one that nobody signed ends the push-pull, since nobody honest passes on what he has not verified.  In a
permissioned network neither side says anything of others to a peer whose record is not known.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from node import log, reconcile
from node import record as records
from node.claim import id_of
from node.datagram import claim_message, parse_claim, parse_suspicion, suspicion_message
from node.reconcile import DIGEST_BYTES
from protos import peers_pb2 as pb
from protos.errors import Equivocation, InvalidRequest, InvalidSignature, PermissionDenied, ShoalError
from protos.limits import (
    PEERS_MESSAGE_BYTES_MAX,
    REVOCATIONS_BYTES_MAX,
    SYNC_BUCKETS_MAX,
    SYNC_CLAIMS_MAX,
    SYNC_RECORDS_MAX,
    SYNC_SUSPICIONS_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from random import Random

    from node.claim import Claim, PeerHash, Suspicion
    from node.roster import Roster
    from protos.ids import PeerId


class Members(Protocol):
    """What a push-pull says and hears of members: node.gossip.Gossip."""

    def claim_digests(self) -> bytes: ...
    def own_claim(self) -> Claim: ...
    def claims_of_differing(self, theirs: list[bytes]) -> tuple[list[int], list[Claim]]: ...
    def claims_newer(self, theirs: Sequence[Claim], buckets: Sequence[int], count: int) -> list[Claim]: ...
    def suspicions(self) -> list[Suspicion]: ...
    def synced(self, peer: PeerId, claims: tuple[Claim, ...], suspicions: tuple[Suspicion, ...]) -> None: ...


@dataclass(slots=True)
class _Taken:
    """What came, beside the records that the roster has now.  `refused`: whose record was not taken, and why."""

    claims: list[Claim] = field(default_factory=list)
    suspicions: list[Suspicion] = field(default_factory=list)
    refused: dict[PeerId, ShoalError] = field(default_factory=dict)
    news: bool = False


@dataclass(slots=True)
class Exchange:
    """One push-pull with `peer`, as who asks sees it."""

    peer: PeerId
    asked: pb.SyncRequest
    taken: _Taken = field(default_factory=_Taken)


class PushPull:
    """Thread-safe."""

    def __init__(self, roster: Roster, members: Members, random: Random) -> None:
        self._roster = roster
        self._members = members
        self._random = random

    # --- the side that asks

    def begin(self, peer: PeerId) -> Exchange:
        """The first request carries the own record and claim, so that the answerer knows at once who asks."""
        roster = self._roster
        with roster.locked:
            asked = reconcile.request(roster)
            asked.records.extend([roster.signed_of(roster.me) or b""])
        asked.claims.extend([_claim_bytes(self._members.own_claim())])
        asked.claim_digests = self._members.claim_digests()
        if self._may_hear(peer):
            self._add_rest(asked)
        asked.revocations = roster.revocations
        return Exchange(peer, asked)

    def go_on(self, exchange: Exchange, reply: pb.SyncReply, host: str) -> pb.SyncRequest | None:
        """After the first reply: the second request, or None.

        Raises InvalidRequest, WrongNetwork, InvalidSignature, InvalidDatagram, and InvalidGrant for a revocation list;
        in a permissioned network also what is wrong with the peer's own record, if that is not known now.
        """
        self._take(reply, host, exchange.taken)
        if not self._may_hear(exchange.peer):
            raise _unknown(exchange, host)
        count = len(exchange.asked.claim_digests) // DIGEST_BYTES
        differing = list(reply.claims_differing)
        if differing != sorted(set(differing)) or any(bucket >= count for bucket in differing):
            raise InvalidRequest("a push-pull is refused: its buckets of claims were not asked about, or not in order")
        with self._roster.locked:
            second = reconcile.follow_up(self._roster, exchange.asked, reply, self._random)
        newer = self._members.claims_newer(exchange.taken.claims, differing, count)
        if newer:
            second = second or pb.SyncRequest(network=self._roster.network.id)
            second.claims.extend(map(_claim_bytes, self._limited(newer)))
        return second

    def end(self, exchange: Exchange, reply: pb.SyncReply | None, host: str) -> bool:
        """After the last reply: all claims are taken.  True: something is new.

        Raises as `go_on`; afterwards also what is wrong with the peer's own record, if that is not known.
        """
        peer, taken = exchange.peer, exchange.taken
        if reply is not None:
            self._take(reply, host, taken)
        self._members.synced(peer, self._known(taken.claims), tuple(taken.suspicions))
        if self._roster.record_of(peer) is None:
            raise _unknown(exchange, host)
        return taken.news

    # --- the side that answers

    def answer(self, caller: PeerId, host: str, request: pb.SyncRequest) -> pb.SyncReply:
        """Raises as `go_on`, and what is wrong with the caller's own record if that is not known.

        PermissionDenied: in a permissioned network it has none.
        """
        taken = _Taken()
        self._take(request, host, taken)
        if self._roster.record_of(caller) is None:
            self._refuse(caller, taken)
        self._members.synced(caller, self._known(taken.claims), tuple(taken.suspicions))
        with self._roster.locked:
            reply = reconcile.reply(self._roster, request, self._random, self._roster.me)
        if request.claim_digests:
            theirs = _digests(request.claim_digests)
            differing, own = self._members.claims_of_differing(theirs)
            reply.claims_differing.extend(differing)
            reply.claims.extend(map(_claim_bytes, self._limited(own)))
        self._add_rest(reply)
        reply.revocations = self._roster.revocations
        return reply

    # --- both

    def _may_hear(self, peer: PeerId) -> bool:
        """Of others: whoever is at an address may look into an open network, and into no other."""
        return not self._roster.network.permissioned or self._roster.record_of(peer) is not None

    def _add_rest(self, message: pb.SyncRequest | pb.SyncReply) -> None:
        suspicions = itertools.islice(self._members.suspicions(), SYNC_SUSPICIONS_MAX)
        message.suspicions.extend(suspicion_message(one).SerializeToString() for one in suspicions)
        message.load = self._roster.load_report()

    def _take(self, message: pb.SyncRequest | pb.SyncReply, host: str, taken: _Taken) -> None:
        _check_counts(message)
        self._roster.network.check(message.network, "a push-pull")
        if message.revocations:
            self._take_revocations(message.revocations)
        for data in _each_of_another(message.records):
            try:
                taken.news |= self._roster.merge(data, host)
            except InvalidSignature:
                raise
            except ShoalError as error:
                log.get("peers").debug("a record was refused", host=host, code=error.code, error=error.message)
                if (peer := _subject(data)) is not None:
                    taken.refused[peer] = error
        if message.load:
            self._roster.merge_load(message.load)
        taken.claims += map(parse_claim, message.claims)
        taken.suspicions += map(parse_suspicion, message.suspicions)

    def _take_revocations(self, data: bytes) -> None:
        """An operator that contradicts itself must not keep its nodes from each other: each stays with its first."""
        try:
            self._roster.merge_revocations(data)
        except Equivocation as error:
            log.get("peers").warning("a revocation list is refused", error=error.message)

    def _refuse(self, caller: PeerId, taken: _Taken) -> None:
        """Anybody may look into an open network."""
        if caller in taken.refused:
            raise taken.refused[caller]
        if self._roster.network.permissioned:
            raise PermissionDenied(
                f"{caller[:8]} is known here as no node of this network, and sent no record of its own"
            )

    def _known(self, claims: Iterable[Claim]) -> tuple[Claim, ...]:
        """One of each peer: who signs thousands of claims of itself makes others verify one of them."""
        newest: dict[PeerHash, Claim] = {}
        for claim in claims:
            other = newest.get(claim.peer)
            if other is None or other.rank < claim.rank:
                newest[claim.peer] = claim
        return tuple(claim for claim in newest.values() if self._roster.record_of(id_of(claim.peer)) is not None)

    def _limited(self, claims: list[Claim]) -> list[Claim]:
        """Of too many, each time others."""
        if len(claims) <= SYNC_CLAIMS_MAX:
            return claims
        return self._random.sample(claims, SYNC_CLAIMS_MAX)


def _unknown(exchange: Exchange, host: str) -> ShoalError:
    """Why nothing is known of who answers."""
    return exchange.taken.refused.get(exchange.peer) or InvalidRequest(
        f"a push-pull with {host} brought no record of who answers there"
    )


def _each_of_another(signed: Iterable[bytes]) -> Iterator[bytes]:
    """The same of records, of which no honest message has two of one peer.  Raises InvalidRequest."""
    seen: set[PeerId] = set()
    for data in signed:
        peer = _subject(data)
        if peer in seen:
            raise InvalidRequest(f"a push-pull is refused: it has two records of {peer[:8]}")
        if peer is not None:
            seen.add(peer)
        yield data


def _subject(data: bytes) -> PeerId | None:
    """Whose record it claims to be; None: it is no record."""
    try:
        return records.opened(data).peer
    except ShoalError:
        return None


def _check_counts(message: pb.SyncRequest | pb.SyncReply) -> None:
    """Before anything is verified.  Raises InvalidRequest."""
    counts = (
        ("bytes", message.ByteSize(), PEERS_MESSAGE_BYTES_MAX),
        ("records", len(message.records), SYNC_RECORDS_MAX + 1),
        ("claims", len(message.claims), SYNC_CLAIMS_MAX + 1),
        ("suspicions", len(message.suspicions), SYNC_SUSPICIONS_MAX),
        ("bytes of revocations", len(message.revocations), REVOCATIONS_BYTES_MAX),
    )
    for what, count, limit in counts:
        if count > limit:
            raise InvalidRequest(f"a push-pull is refused: it has {count} {what}; at most {limit} are allowed")


def _digests(data: bytes) -> list[bytes]:
    count = len(data) // DIGEST_BYTES
    if len(data) % DIGEST_BYTES or count > SYNC_BUCKETS_MAX or count & (count - 1):
        raise InvalidRequest(f"a push-pull is refused: {len(data)} bytes are no digests of claims")
    return [data[n : n + DIGEST_BYTES] for n in range(0, len(data), DIGEST_BYTES)]


def _claim_bytes(claim: Claim) -> bytes:
    return claim_message(claim).SerializeToString(deterministic=True)
