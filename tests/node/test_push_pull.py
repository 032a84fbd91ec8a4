"""PROTOCOL.md section 17: what two nodes know is the same after at most two round trips, and lies have a name."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_gossip import NOW, Clock, One, Person, exchange

from node import grant as grants
from node import revocations
from node.claim import encoded_bytes
from node.datagram import claim_message, suspicion_message
from node.grant import Grant
from node.identity import Identity
from node.load_report import LoadReport
from node.load_report import sign as sign_load
from node.member import State
from node.membership_event import Forget, Received
from node.message import Gossip as News
from node.network import open_network, permissioned
from node.reconcile import DIGEST_BYTES, ENTRY_BYTES
from node.revocations import Revocations
from protos import peers_pb2 as pb
from protos.errors import (
    GrantMissing,
    GrantRevoked,
    InvalidDatagram,
    InvalidGrant,
    InvalidRequest,
    InvalidSignature,
    Overloaded,
    PermissionDenied,
    RecordExpired,
    RecordFromFuture,
    ShoalError,
    WrongNetwork,
)
from protos.ids import PeerId
from protos.limits import (
    INCARNATION_MAX,
    PEERS_MESSAGE_BYTES_MAX,
    RECORD_BYTES_MAX,
    RECORDS_MAX,
    REVOCATIONS_BYTES_MAX,
    SYNC_BUCKETS_MAX,
    SYNC_CLAIMS_MAX,
    SYNC_RECORDS_MAX,
    SYNC_SUSPICIONS_MAX,
)

if TYPE_CHECKING:
    from node.push_pull import Exchange

NETWORK = open_network().id
NOBODY = PeerId("a" * 52)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pair(clock: Clock) -> tuple[One, One]:
    """Two that know nothing of each other."""
    return One(clock), One(clock)


@pytest.fixture
def met(pair: tuple[One, One]) -> tuple[One, One]:
    exchange(*pair)
    return pair


def people(count: int) -> list[Person]:
    return [Person.create(f"10.0.{n // 250}.{1 + n % 250}:7645") for n in range(count)]


def alive(one: One) -> set[str]:
    return set(one.roster.alive())


def claim_bytes(person: Person, above: int = 0) -> bytes:
    return claim_message(person.claim(above)).SerializeToString()


def request(**fields: object) -> pb.SyncRequest:
    return pb.SyncRequest(**({"network": NETWORK} | fields))


def answer(one: One, message: pb.SyncRequest, caller: str = "a" * 52) -> pb.SyncReply:
    return one.gossip.push_pull.answer(caller, "there", message)


def begun(one: One, peer: PeerId = NOBODY) -> tuple[Exchange, pb.SyncReply]:
    """A push-pull that was asked for, and an answer that says nothing."""
    return one.gossip.push_pull.begin(peer), pb.SyncReply(network=NETWORK)


# --- two that differ -----------------------------------------------------------------------------------------------


def test_two_strangers_know_each_other_after_one(pair: tuple[One, One]) -> None:
    one, two = pair
    assert len(exchange(one, two)) <= 4
    assert one.roster.record_of(two.peer) == two.roster.record_of(two.peer)
    assert (alive(one), alive(two)) == ({two.peer}, {one.peer})


def test_unequal_nodes_agree_on_records_and_claims_after_two_round_trips(pair: tuple[One, One]) -> None:
    one, two = pair
    crowd = people(120)
    one.knows(*crowd[:70])
    two.knows(*crowd[50:])
    newer = [person.claim(5, sequence=2) for person in crowd[50:60]]
    one.gossip.synced(crowd[0].peer, tuple(newer), ())
    two.roster.merge(crowd[69].record(sequence=9), "there")
    assert len(exchange(one, two)) <= 4
    everybody = {person.peer for person in crowd}
    assert alive(one) == everybody | {two.peer}
    assert alive(two) == everybody | {one.peer}
    assert one.gossip.claim_digests() == two.gossip.claim_digests()
    assert one.roster.record_of(crowd[69].peer).sequence == 9
    for claim in newer:
        assert two.gossip._core.member(claim.peer).claim == claim
    assert len(exchange(one, two)) == 2, "and now they are equal"


def test_equal_ones_exchange_less_than_5_kb(pair: tuple[One, One]) -> None:
    crowd = people(400)
    for node in pair:
        node.knows(*crowd)
    exchange(*pair)
    messages = exchange(*pair)
    assert len(messages) == 2
    assert sum(message.ByteSize() for message in messages) < 5000
    assert not messages[1].claims
    assert not messages[1].records


def test_who_left_is_known_as_such_to_who_knew_him_and_to_nobody_else(met: tuple[One, One]) -> None:
    one, two = met
    gone, unknown = people(2)
    for node in met:
        node.knows(gone)
    one.knows(unknown)
    for person in (gone, unknown):
        one.gossip.synced(person.peer, (person.claim(1, left=True),), ())
    exchange(two, one)
    assert (two.state(gone.peer), two.state(unknown.peer)) == (State.LEFT, None)
    assert two.roster.record_of(unknown.peer) is not None
    assert len(exchange(two, one)) == 2


def test_who_left_is_told_in_the_second_request_too(met: tuple[One, One]) -> None:
    one, two = met
    (gone,) = people(1)
    for node in met:
        node.knows(gone)
    one.gossip.synced(gone.peer, (gone.claim(1, left=True),), ())
    exchange(one, two)
    assert two.state(gone.peer) is State.LEFT


def test_suspicions_go_along_either_way(met: tuple[One, One]) -> None:
    one, two = met
    crowd = people(4)
    for node in met:
        node.knows(*crowd)
    one.gossip.handle(Received(crowd[0].hash, News((crowd[0].suspicion(crowd[1]),))))
    two.gossip.handle(Received(crowd[2].hash, News((crowd[2].suspicion(crowd[3]),))))
    exchange(one, two)
    for node in met:
        assert [node.state(person.peer) for person in crowd] == [
            State.ALIVE, State.SUSPECT, State.ALIVE, State.SUSPECT,
        ]  # fmt: skip


def test_load_goes_along_either_way(met: tuple[One, One], clock: Clock) -> None:
    one, two = met
    clock.now += 1.0
    one.load = replace(one.load, queue=7)
    exchange(one, two)
    queues = {status.peer_id: status.queue for status in two.roster.status()}
    assert queues[one.peer] == 7
    assert {status.peer_id: status.queue for status in one.roster.status()}[two.peer] == 3


def test_somebody_elses_load_is_taken_and_that_of_an_unknown_peer_forgotten(met: tuple[One, One]) -> None:
    one, _ = met
    known, unknown = people(2)
    one.knows(known)
    for person in (known, unknown):
        report = LoadReport(NETWORK, person.identity.public_key, int(NOW * 1000), queue=9)
        answer(one, request(load=sign_load(report, person.identity)))
    answer(one, request(load=b"no report"))
    queues = {status.peer_id: status.queue for status in one.roster.status()}
    assert queues[known.peer] == 9
    assert one.roster._loads.get(unknown.peer, NOW) is None


def test_claims_of_peers_without_a_record_are_left_out(pair: tuple[One, One]) -> None:
    one, _ = pair
    stranger, known = people(2)
    one.knows(known)
    answer(one, request(claims=[claim_bytes(stranger), claim_bytes(known, 3)]))
    assert one.state(stranger.peer) is None
    assert one.gossip._core.member(known.hash).claim == known.claim(3)
    asked, reply = begun(one, known.peer)
    reply.records.append(known.record())
    reply.claims.append(claim_bytes(stranger))
    one.gossip.push_pull.go_on(asked, reply, "there")
    assert one.gossip.push_pull.end(asked, None, "there") is False
    assert one.state(stranger.peer) is None


def test_forgotten_members_come_back_with_the_next(met: tuple[One, One]) -> None:
    one, two = met
    one.gossip.handle(Forget(two.hash))
    assert one.state(two.peer) is None
    exchange(one, two)
    assert one.state(two.peer) is State.ALIVE


# --- permissioned networks -----------------------------------------------------------------------------------------


class Operated:
    """A permissioned network and its operator."""

    def __init__(self, clock: Clock) -> None:
        self.operator = Identity.create()
        self.network = permissioned(self.operator.public_key)
        self.clock = clock

    def grant(self, identity: Identity) -> bytes:
        now_ms = int(NOW * 1000)
        return grants.sign(Grant(identity.peer, now_ms, now_ms + 7_200_000), self.operator)

    def one(self) -> One:
        identity = Identity.create()
        return One(self.clock, identity=identity, network=self.network, grant=self.grant(identity))

    def revoked(self, *peers: str, version: int = 1) -> bytes:
        return revocations.sign(
            Revocations(version, int(NOW * 1000), dict.fromkeys(peers, int(NOW * 1000))), self.operator
        )


def test_a_revocation_list_goes_along_and_puts_its_peers_out(clock: Clock) -> None:
    net = Operated(clock)
    one, two, three = net.one(), net.one(), net.one()
    exchange(one, two)
    exchange(one, three)
    exchange(two, three)
    one.roster.merge_revocations(net.revoked(three.peer))
    exchange(one, two)
    assert two.roster.revocations == one.roster.revocations
    assert two.roster.record_of(three.peer) is None
    with pytest.raises(ShoalError) as refused:
        exchange(three, two)
    assert refused.value.code in ("grant_revoked", "permission_denied")


def test_nodes_of_an_operator_that_contradicts_itself_still_exchange_the_rest(clock: Clock) -> None:
    net = Operated(clock)
    one, two, three = net.one(), net.one(), net.one()
    exchange(one, three)
    one.roster.merge_revocations(net.revoked("a" * 52))
    two.roster.merge_revocations(net.revoked("b" * 52))
    kept = two.roster.revocations
    exchange(two, one)
    assert two.roster.record_of(three.peer) is not None
    assert two.roster.revocations == kept


def test_a_list_of_somebody_else_is_refused(clock: Clock) -> None:
    net, other = Operated(clock), Operated(clock)
    one = net.one()
    for wrong, error in ((other.revoked("a" * 52), WrongNetwork), (b"none", InvalidGrant)):
        with pytest.raises(error):
            answer(one, pb.SyncRequest(network=net.network.id, revocations=wrong))
    assert one.roster.revocations == b""


def test_without_a_grant_nobody_looks_into_a_permissioned_network(clock: Clock) -> None:
    net = Operated(clock)
    one = net.one()
    spy = Person.create(network=net.network)
    with pytest.raises(GrantMissing):
        answer(one, pb.SyncRequest(network=net.network.id, records=[spy.record()]), spy.peer)
    with pytest.raises(PermissionDenied):
        answer(one, pb.SyncRequest(network=net.network.id), spy.peer)
    with pytest.raises(PermissionDenied):
        own = one.roster.signed_of(one.peer)
        answer(one, pb.SyncRequest(network=net.network.id, records=[own]), spy.peer)


@pytest.mark.parametrize("is_revoked", [False, True])
def test_who_asks_tells_nothing_of_others_to_whoever_answers_without_a_grant(clock: Clock, is_revoked: bool) -> None:
    net = Operated(clock)
    one, two, three = net.one(), net.one(), net.one()
    for each in (two, three):
        exchange(one, each)
    if is_revoked:
        one.roster.merge_revocations(net.revoked(two.peer))
        spy, record = two.peer, two.roster.signed_of(two.peer)
    else:
        outsider = Person.create(network=net.network)
        spy, record = outsider.peer, outsider.record()
    for records in ([], [record]):
        asked = one.gossip.push_pull.begin(spy)
        assert list(asked.asked.records) == [one.roster.signed_of(one.peer)]
        assert len(asked.asked.claims) == 1
        assert (len(asked.asked.suspicions), asked.asked.load) == (0, b"")
        reply = pb.SyncReply(network=net.network.id, differing=[0], claims_differing=[0], records=records)
        with pytest.raises((InvalidRequest, GrantMissing, GrantRevoked)):
            one.gossip.push_pull.go_on(asked, reply, "there")


def test_who_has_a_grant_and_is_known_hears_suspicions_and_load_in_the_first_request(clock: Clock) -> None:
    net = Operated(clock)
    one, two = net.one(), net.one()
    exchange(one, two)
    assert alive(one) == {two.peer}
    assert one.gossip.push_pull.begin(two.peer).asked.load


def test_ten_thousand_invented_identities_cost_a_permissioned_network_no_room(clock: Clock) -> None:
    net = Operated(clock)
    one, two = net.one(), net.one()
    spies = [Person.create(network=net.network) for _ in range(50)]
    asked = two.gossip.push_pull.begin(one.peer).asked
    asked.records.extend(spy.record() for spy in spies)
    answer(one, asked, two.peer)
    assert {status.peer_id for status in one.roster.status()} == {one.peer, two.peer}


# --- what is refused -----------------------------------------------------------------------------------------------


def test_a_record_that_is_refused_keeps_no_other_out(pair: tuple[One, One]) -> None:
    one, two = pair
    good, foreign, late, another = people(4)
    asked = two.gossip.push_pull.begin(one.peer).asked
    asked.records.extend([
        good.record(),
        replace(foreign, network=open_network("another")).record(),
        b"none",
        late.record(issued_at_ms=1, expires_at_ms=2),
        another.record(),
    ])  # fmt: skip
    answer(one, asked, two.peer)
    assert {status.peer_id for status in one.roster.status()} == {one.peer, two.peer, good.peer, another.peer}


def test_a_record_that_nobody_signed_ends_the_push_pull(pair: tuple[One, One]) -> None:
    """Eight writes of "offline" in others' names took a whole swarm down once: here the first is the last."""
    one, two = pair
    victim, villain = people(2)
    one.knows(victim)
    forged = pb.SignedRecord.FromString(villain.record(public_key=victim.identity.public_key, sequence=9, held=()))
    asked = two.gossip.push_pull.begin(one.peer).asked
    asked.records.extend([forged.SerializeToString()] * 8)
    asked.claims.append(claim_bytes(victim, 7))
    verified = one.roster._table.merge
    calls = []
    one.roster._table.merge = lambda *given: calls.append(1) or verified(*given)
    with pytest.raises(InvalidSignature):
        answer(one, asked, two.peer)
    assert len(calls) == 2, "the caller's own, and the first forgery"
    assert one.roster.record_of(victim.peer).sequence == 1
    assert one.gossip._core.member(victim.hash).claim == victim.claim()


def test_who_passes_forged_claims_on_is_refused_at_the_first(met: tuple[One, One]) -> None:
    one, two = met
    crowd = people(20)
    one.knows(*crowd)
    forged = [
        claim_message(replace(crowd[n % 20].claim(), incarnation=int(NOW * 1000) + 1 + n)).SerializeToString()
        for n in range(SYNC_CLAIMS_MAX)
    ]
    before = one.gossip.claim_digests()
    answer(one, request(claims=forged), two.peer)
    assert one.gossip.claim_digests() == before
    assert one.gossip.counts["refused: a signature does not fit"] == 1


@pytest.mark.parametrize(("hours", "error"), [(1, RecordFromFuture), (-2, RecordExpired)])
def test_a_caller_whose_clock_is_hours_off_hears_what_is_wrong(clock: Clock, hours: int, error: type) -> None:
    theirs = Clock()
    theirs.now = NOW + 3600 * hours
    one, other = One(clock), One(theirs)
    with pytest.raises(error):
        exchange(other, one)
    assert one.roster.record_of(other.peer) is None
    assert one.state(other.peer) is None


def test_who_asks_hears_what_is_wrong_with_the_record_of_who_answers(pair: tuple[One, One], clock: Clock) -> None:
    one, _ = pair
    other = Person.create()
    asked, reply = begun(one, other.peer)
    reply.records.append(
        other.record(issued_at_ms=int(NOW * 1000) + 3_600_000, expires_at_ms=int(NOW * 1000) + 7_200_000)
    )
    one.gossip.push_pull.go_on(asked, reply, "there")
    with pytest.raises(RecordFromFuture):
        one.gossip.push_pull.end(asked, None, "there")
    asked, reply = begun(one, other.peer)
    one.gossip.push_pull.go_on(asked, reply, "there")
    with pytest.raises(InvalidRequest, match="no record of who answers"):
        one.gossip.push_pull.end(asked, None, "there")


def test_another_network_is_refused_on_either_side(pair: tuple[One, One], clock: Clock) -> None:
    one, _ = pair
    other = One(clock, network=open_network("another"))
    with pytest.raises(WrongNetwork):
        exchange(one, other)
    asked = one.gossip.push_pull.begin(other.peer)
    with pytest.raises(WrongNetwork):
        one.gossip.push_pull.go_on(asked, pb.SyncReply(network=other.roster.network.id), "there")
    asked = one.gossip.push_pull.begin(other.peer)
    one.gossip.push_pull.go_on(asked, pb.SyncReply(network=NETWORK), "there")
    with pytest.raises(WrongNetwork):
        one.gossip.push_pull.end(asked, pb.SyncReply(), "there")


@pytest.mark.parametrize(
    "wrong",
    [
        {"claim_digests": b"x"},
        {"claim_digests": bytes(3 * DIGEST_BYTES)},
        {"claim_digests": bytes(2 * SYNC_BUCKETS_MAX * DIGEST_BYTES)},
        {"digests": b"x"},
        {"wants": b"x"},
    ],
)
def test_digests_that_cannot_be_are_refused(pair: tuple[One, One], wrong: dict[str, bytes]) -> None:
    with pytest.raises(InvalidRequest):
        answer(pair[0], request(**wrong))


@pytest.mark.parametrize("buckets", [[1], [2**32 - 1], [0, 0], [0, 1]])
def test_buckets_of_claims_that_were_not_asked_about_are_refused(pair: tuple[One, One], buckets: list[int]) -> None:
    one, _ = pair
    asked, reply = begun(one)
    assert len(asked.asked.claim_digests) == DIGEST_BYTES
    reply.claims_differing.extend(buckets)
    with pytest.raises(InvalidRequest, match="buckets of claims"):
        one.gossip.push_pull.go_on(asked, reply, "there")


def test_buckets_out_of_order_are_refused(pair: tuple[One, One]) -> None:
    """Each that is named again would be looked through again, and a message has room for millions."""
    one, _ = pair
    one.knows(*people(20))
    asked, reply = begun(one)
    assert len(asked.asked.claim_digests) == 2 * DIGEST_BYTES
    reply.claims_differing.extend([1, 0])
    with pytest.raises(InvalidRequest, match="buckets of claims"):
        one.gossip.push_pull.go_on(asked, reply, "there")


@pytest.mark.parametrize("fields", [{"claims": [b"?"]}, {"claims": [b""]}, {"suspicions": [b"?"]}])
def test_what_is_no_claim_or_suspicion_is_refused_on_either_side(
    met: tuple[One, One], fields: dict[str, list[bytes]]
) -> None:
    one, two = met
    with pytest.raises(InvalidDatagram):
        answer(one, request(**fields), two.peer)
    asked, _ = begun(one)
    with pytest.raises(InvalidDatagram):
        one.gossip.push_pull.go_on(asked, pb.SyncReply(network=NETWORK, **fields), "there")
    assert one.state(two.peer) is State.ALIVE


# --- limits --------------------------------------------------------------------------------------------------------


def test_so_many_claims_and_no_more(met: tuple[One, One]) -> None:
    one, two = met
    data = claim_bytes(Person.create())
    answer(one, request(claims=[data] * (SYNC_CLAIMS_MAX + 1)), two.peer)
    with pytest.raises(InvalidRequest, match=f"at most {SYNC_CLAIMS_MAX + 1}"):
        answer(one, request(claims=[data] * (SYNC_CLAIMS_MAX + 2)), two.peer)
    with pytest.raises(InvalidRequest, match=f"at most {SYNC_CLAIMS_MAX + 1}"):
        reply = pb.SyncReply(network=NETWORK, claims=[data] * (SYNC_CLAIMS_MAX + 2))
        one.gossip.push_pull.go_on(begun(one)[0], reply, "there")


def test_so_many_suspicions_and_no_more(met: tuple[One, One], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = met
    accuser, accused = people(2)
    suspicion = accuser.suspicion(accused)
    data = suspicion_message(suspicion).SerializeToString()
    answer(one, request(suspicions=[data] * SYNC_SUSPICIONS_MAX), two.peer)
    with pytest.raises(InvalidRequest, match=f"at most {SYNC_SUSPICIONS_MAX}"):
        answer(one, request(suspicions=[data] * (SYNC_SUSPICIONS_MAX + 1)), two.peer)
    monkeypatch.setattr(one.gossip, "suspicions", lambda: [suspicion] * (SYNC_SUSPICIONS_MAX + 9))
    assert len(one.gossip.push_pull.begin(NOBODY).asked.suspicions) == SYNC_SUSPICIONS_MAX
    exchange(one, two)


def test_so_many_records_and_no_more(met: tuple[One, One]) -> None:
    one, two = met
    answer(one, request(records=[b"none"] * (SYNC_RECORDS_MAX + 1)), two.peer)
    with pytest.raises(InvalidRequest, match=f"at most {SYNC_RECORDS_MAX + 1}"):
        answer(one, request(records=[b"none"] * (SYNC_RECORDS_MAX + 2)), two.peer)


def test_of_one_peer_no_more_than_one_record_and_one_claim_is_verified(
    met: tuple[One, One], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys cost nothing, and who has one can sign as much as he likes."""
    one, two = met
    signer = Person.create()
    one.knows(signer)
    with pytest.raises(InvalidRequest, match="two records"):
        answer(one, request(records=[signer.record(n) for n in range(2, 9)]), two.peer)
    assert one.roster.record_of(signer.peer).sequence == 2
    verified = []
    monkeypatch.setattr("node.identity.verify", lambda *signed: verified.append(signed))
    answer(one, request(claims=[claim_bytes(signer, n) for n in (3, 9, 5)]), two.peer)
    assert len(verified) == 1
    assert one.gossip._core.member(signer.hash).claim == signer.claim(9)


def test_so_many_bytes_of_revocations_and_no_more(met: tuple[One, One]) -> None:
    one, two = met
    with pytest.raises(InvalidRequest, match=f"at most {REVOCATIONS_BYTES_MAX}"):
        answer(one, request(revocations=bytes(REVOCATIONS_BYTES_MAX + 1)), two.peer)
    with pytest.raises(InvalidGrant):
        answer(one, request(revocations=bytes(REVOCATIONS_BYTES_MAX)), two.peer)


def test_so_many_bytes_and_no_more(met: tuple[One, One]) -> None:
    one, two = met
    message = request(load=bytes(PEERS_MESSAGE_BYTES_MAX))
    with pytest.raises(InvalidRequest, match=f"bytes; at most {PEERS_MESSAGE_BYTES_MAX}"):
        answer(one, message, two.peer)
    message.load = bytes(PEERS_MESSAGE_BYTES_MAX - (message.ByteSize() - PEERS_MESSAGE_BYTES_MAX))
    assert message.ByteSize() == PEERS_MESSAGE_BYTES_MAX
    answer(one, message, two.peer)  # no load report either, which is told in the log alone


def test_the_longest_of_everything_fits_one_message(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply that its receiver would refuse keeps two nodes from each other for ever."""
    one = One(clock)
    person = Person.create()
    claim = replace(person.claim(), incarnation=INCARNATION_MAX, sequence=2**64 - 1, left=True)
    suspicion = replace(person.suspicion(person), incarnation=INCARNATION_MAX)
    assert encoded_bytes(claim) > 120
    made = pb.SyncReply(network=NETWORK)
    made.entries = bytes(ENTRY_BYTES * RECORDS_MAX)
    made.differing.extend([255] * SYNC_BUCKETS_MAX)
    made.claims_differing.extend([255] * SYNC_BUCKETS_MAX)
    made.records.extend(longest_records(one, monkeypatch))
    made.claims.extend([claim_message(claim).SerializeToString()] * (SYNC_CLAIMS_MAX + 1))
    made.suspicions.extend([suspicion_message(suspicion).SerializeToString()] * SYNC_SUSPICIONS_MAX)
    made.revocations = bytes(REVOCATIONS_BYTES_MAX)
    made.load = bytes(512)
    assert 0.9 * PEERS_MESSAGE_BYTES_MAX < made.ByteSize() <= PEERS_MESSAGE_BYTES_MAX


def longest_records(one: One, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """As many as an answer takes."""
    one.knows(*people(300))
    monkeypatch.setattr(one.roster, "signed_of", lambda _: bytes(RECORD_BYTES_MAX))
    message = request(digests=bytes(DIGEST_BYTES))
    return list(answer(one, message).records)


def test_of_too_many_claims_others_go_each_time(pair: tuple[One, One], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.push_pull.SYNC_CLAIMS_MAX", 40)
    one, two = pair
    crowd = people(100)
    one.knows(*crowd)
    before = 0
    for rounds in itertools.count(1):
        messages = exchange(two, one) if rounds % 2 else exchange(one, two)
        assert all(len(message.claims) <= 41 for message in messages)
        if len(alive(two)) == 101:
            break
        assert len(alive(two)) >= before
        before = len(alive(two))
        assert rounds < 30
    assert rounds > 1


def test_a_sender_introduces_no_more_newcomers_than_one_may(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.newcomers.NEWCOMERS_OF_SENDER_MAX", 10)
    one = One(clock)
    crowd = people(30)
    answer(one, request(records=[person.record() for person in crowd]))
    assert len(one.roster.status()) == 1 + 10
    late = Person.create()
    with pytest.raises(Overloaded):
        answer(one, request(records=[late.record()]), late.peer)


# --- any bytes -----------------------------------------------------------------------------------------------------

FUZZED = One(Clock())
KNOWN = people(3)
FUZZED.knows(*KNOWN)
PARTS = [
    b"",
    *(person.record() for person in KNOWN),
    *(claim_bytes(person, 1) for person in KNOWN),
    suspicion_message(KNOWN[0].suspicion(KNOWN[1])).SerializeToString(),
    FUZZED.roster.load_report(),
]
pieces = st.one_of(st.sampled_from(PARTS), st.binary(max_size=80), st.sampled_from(PARTS).map(lambda data: data[:-1]))
requests = st.builds(
    pb.SyncRequest,
    network=st.one_of(st.just(NETWORK), st.binary(max_size=33)),
    digests=st.one_of(st.binary(max_size=64), st.just(bytes(DIGEST_BYTES)), st.just(bytes(4 * DIGEST_BYTES))),
    records=st.lists(pieces, max_size=4),
    wants=st.one_of(st.binary(max_size=17), st.just(bytes(8))),
    claims=st.lists(pieces, max_size=4),
    suspicions=st.lists(pieces, max_size=4),
    revocations=st.one_of(st.just(b""), pieces),
    load=pieces,
    claim_digests=st.one_of(st.binary(max_size=64), st.just(bytes(DIGEST_BYTES)), st.just(bytes(8 * DIGEST_BYTES))),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(requests)
def test_any_request_is_answered_or_a_typed_error(message: pb.SyncRequest) -> None:
    with contextlib.suppress(ShoalError):
        assert answer(FUZZED, message, KNOWN[0].peer).network == NETWORK


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=200))
def test_any_bytes_that_are_a_request_are_answered_or_a_typed_error(data: bytes) -> None:
    with contextlib.suppress(DecodeError, ShoalError):
        message = pb.SyncRequest.FromString(data)
        message.network = NETWORK
        answer(FUZZED, message)


replies = st.builds(
    pb.SyncReply,
    network=st.just(NETWORK),
    differing=st.lists(st.integers(0, 300), max_size=3),
    entries=st.one_of(st.binary(max_size=40), st.just(bytes(ENTRY_BYTES))),
    records=st.lists(pieces, max_size=3),
    claims=st.lists(pieces, max_size=3),
    suspicions=st.lists(pieces, max_size=3),
    revocations=st.one_of(st.just(b""), pieces),
    load=pieces,
    claims_differing=st.lists(st.integers(0, 300), max_size=3),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(replies, replies)
def test_any_replies_end_a_push_pull_or_are_a_typed_error(first: pb.SyncReply, last: pb.SyncReply) -> None:
    asking = FUZZED.gossip.push_pull
    asked = asking.begin(KNOWN[0].peer)
    with contextlib.suppress(ShoalError):
        asking.go_on(asked, first, "there")
        asking.end(asked, last, "there")
