"""PushPull: what a push-pull's messages say of records, claims, suspicions and load, and what is taken from them.

Blocks on no network.  PROTOCOL.md, section 17.  Law: records are taken before claims, and a claim counts only where
its peer's record is known, so that nobody is a member of whom nothing is known.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from node import log, reconcile
from node.claim import id_of
from node.datagram import claim_message, parse_claim, parse_suspicion, suspicion_message
from node.reconcile import DIGEST_BYTES
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest, ShoalError
from protos.limits import (
    PEERS_MESSAGE_BYTES_MAX,
    REVOCATIONS_BYTES_MAX,
    SYNC_BUCKETS_MAX,
    SYNC_CLAIMS_MAX,
    SYNC_RECORDS_MAX,
    SYNC_SUSPICIONS_MAX,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from random import Random

    from node.claim import Claim, Suspicion
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
class Exchange:
    """One push-pull, as who asks sees it."""

    asked: pb.SyncRequest
    claims: list[Claim] = field(default_factory=list)
    suspicions: list[Suspicion] = field(default_factory=list)
    news: bool = False


class PushPull:
    """Thread-safe."""

    def __init__(self, roster: Roster, members: Members, random: Random) -> None:
        self._roster = roster
        self._members = members
        self._random = random

    # --- the side that asks

    def begin(self) -> Exchange:
        """The first request carries the own record and claim, so that the answerer knows at once who asks."""
        roster = self._roster
        with roster.locked:
            asked = reconcile.request(roster)
            asked.records.extend([roster.signed_of(roster.me) or b""])
        asked.claims.extend([_claim_bytes(self._members.own_claim())])
        asked.claim_digests = self._members.claim_digests()
        self._add_rest(asked)
        return Exchange(asked)

    def go_on(self, exchange: Exchange, reply: pb.SyncReply, host: str) -> pb.SyncRequest | None:
        """After the first reply: the second request, or None.  Raises InvalidRequest, WrongNetwork."""
        self._take_reply(exchange, reply, host)
        count = len(exchange.asked.claim_digests) // DIGEST_BYTES
        if any(bucket >= count for bucket in reply.claims_differing):
            raise InvalidRequest("a push-pull is refused: it names buckets of claims that were not asked about")
        with self._roster.locked:
            second = reconcile.follow_up(self._roster, exchange.asked, reply, self._random)
        newer = self._members.claims_newer(exchange.claims, reply.claims_differing, count)
        if newer:
            second = second or pb.SyncRequest(network=self._roster.network.id)
            second.claims.extend(map(_claim_bytes, self._limited(newer)))
        return second

    def end(self, exchange: Exchange, peer: PeerId, reply: pb.SyncReply | None, host: str) -> bool:
        """After the last reply: all claims are taken.  True: something is new."""
        if reply is not None:
            self._take_reply(exchange, reply, host)
        self._members.synced(peer, self._known(exchange.claims), tuple(exchange.suspicions))
        return exchange.news

    # --- the side that answers

    def answer(self, caller: PeerId, host: str, request: pb.SyncRequest) -> pb.SyncReply:
        """Raises InvalidRequest, WrongNetwork, and what is wrong with the caller's own record if that is not known."""
        _check_counts(request)
        self._roster.network.check(request.network, "a push-pull")
        claims, suspicions, _ = self._take(request, host, caller)
        self._members.synced(caller, self._known(claims), tuple(suspicions))
        with self._roster.locked:
            reply = reconcile.reply(self._roster, request, self._random)
        if request.claim_digests:
            theirs = _digests(request.claim_digests)
            differing, own = self._members.claims_of_differing(theirs)
            reply.claims_differing.extend(differing)
            reply.claims.extend(map(_claim_bytes, self._limited(own)))
        self._add_rest(reply)
        return reply

    # --- both

    def _add_rest(self, message: pb.SyncRequest | pb.SyncReply) -> None:
        suspicions = itertools.islice(self._members.suspicions(), SYNC_SUSPICIONS_MAX)
        message.suspicions.extend(suspicion_message(one).SerializeToString() for one in suspicions)
        message.revocations = self._roster.revocations
        message.load = self._roster.load_report()

    def _take_reply(self, exchange: Exchange, reply: pb.SyncReply, host: str) -> None:
        _check_counts(reply)
        self._roster.network.check(reply.network, "a push-pull")
        claims, suspicions, news = self._take(reply, host, None)
        exchange.claims += claims
        exchange.suspicions += suspicions
        exchange.news |= news

    def _take(
        self, message: pb.SyncRequest | pb.SyncReply, host: str, caller: PeerId | None
    ) -> tuple[list[Claim], list[Suspicion], bool]:
        """One record that is refused is no reason to refuse the others, unless nothing else is known of the caller."""
        if message.revocations:
            self._roster.merge_revocations(message.revocations)
        refused: ShoalError | None = None
        news = False
        for data in message.records:
            try:
                news |= self._roster.merge(data, host)
            except ShoalError as error:
                refused = error
                log.get("peers").debug("a record was refused", host=host, code=error.code, error=error.message)
        if caller is not None and refused is not None and self._roster.record_of(caller) is None:
            raise refused
        if message.load:
            self._roster.merge_load(message.load)
        claims = [parse_claim(data) for data in message.claims]
        suspicions = [parse_suspicion(data) for data in message.suspicions]
        return claims, suspicions, news

    def _known(self, claims: Iterable[Claim]) -> tuple[Claim, ...]:
        return tuple(claim for claim in claims if self._roster.record_of(id_of(claim.peer)) is not None)

    def _limited(self, claims: list[Claim]) -> list[Claim]:
        """Of too many, each time others."""
        if len(claims) <= SYNC_CLAIMS_MAX:
            return claims
        return self._random.sample(claims, SYNC_CLAIMS_MAX)


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
