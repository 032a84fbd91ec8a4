"""The driver of membership, without a network: where datagrams go, and what bad ones and floods of them get."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_gossip import HOLDS, MODEL, NOW, QUIET, Clock, One, Person, exchange, read, tick_until

from coordinator.view import Health
from node import gossip, identity, revocations
from node import grant as grants
from node.bridge import Inbox
from node.claim import hash_of, id_of
from node.gossip import (
    GREETINGS_AT_ONCE_MAX,
    HOST_PER_S,
    SENDER_PER_S,
    SENDERS_MAX,
    STRANGER_FAILED_S_MAX,
    STRANGERS_MAX,
    SYNCS_AT_ONCE_MAX,
    SYNCS_WAITING_MAX,
    TOLD_MAX,
)
from node.grant import Grant
from node.identity import Identity
from node.load_report import LoadReport
from node.load_report import sign as sign_load
from node.member import State
from node.membership_event import Forget, Greet, RecordIssued, Tick
from node.message import Ack, Nack, Ping, PingRequest
from node.message import Gossip as News
from node.network import open_network, permissioned
from node.profile import LAN
from node.revocations import Revocations
from protos import peers_pb2 as pb
from protos.errors import DeadlineExceeded, Overloaded, PeerLost, RecordFromFuture, Unavailable, WrongPeer
from protos.limits import DATAGRAM_BYTES_MAX, ERROR_MESSAGE_CHARS_MAX

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from node.message import Message
    from protos.ids import PeerId

WAIT_S = 20.0
NETWORK = open_network().id


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def one(clock: Clock) -> One:
    return One(clock)


@pytest.fixture
def people() -> list[Person]:
    return [Person.create(f"10.0.0.{n}:7645") for n in range(1, 6)]


@pytest.fixture
def known(one: One, people: list[Person]) -> One:
    """Knows all of them, and has greeted them."""
    one.knows(*people)
    one.sent()
    return one


class Wishes:
    """Stands for the queue of push-pulls."""

    def __init__(self, one: One) -> None:
        self.peers: list[PeerId] = []
        one.gossip._syncs = one.gossip._stranger = self

    def put(self, peer: bytes) -> None:
        self.peers.append(id_of(peer))


def of(messages: Iterable[tuple[str, Message]], kind: type) -> list[tuple[str, Message]]:
    return [(address, message) for address, message in messages if isinstance(message, kind)]


def table(one: One) -> dict[bytes, object]:
    return {member.claim.peer: member for member in one.gossip._core.members()}


# --- where answers go ----------------------------------------------------------------------------------------------


def test_an_answer_goes_to_the_address_in_the_record_and_never_to_a_datagrams_source(
    known: One, people: list[Person]
) -> None:
    known.hears(people[0], Ping(7), "6.6.6.6", 666)
    assert known.sent() == [("10.0.0.1:7645", Ack(7))]
    for message in (Ack(1), Nack(1), News(), PingRequest(3, people[1].hash)):
        known.hears(people[0], message, "6.6.6.6", 666)
    assert {address for address, _ in known.sent()} <= {"10.0.0.1:7645", "10.0.0.2:7645"}


def test_a_peer_that_moved_is_answered_where_its_newest_record_says(known: One, people: list[Person]) -> None:
    known.roster.merge(people[0].record(2, addresses=("10.9.9.9:1",)), "there")
    known.hears(people[0], Ping(7))
    assert known.sent() == [("10.9.9.9:1", Ack(7))]


def test_an_ack_makes_a_peer_usable_and_one_that_nobody_waits_for_does_not(
    one: One, people: list[Person], clock: Clock
) -> None:
    one.knows(*people[:2])
    pings = dict(of(one.sent(), Ping))
    assert set(pings) == {"10.0.0.1:7645", "10.0.0.2:7645"}, "newcomers are greeted"
    clock.now += 0.02
    one.hears(people[0], Ack(pings["10.0.0.1:7645"].nonce))
    one.hears(people[1], Ack(pings["10.0.0.2:7645"].nonce ^ 1))
    one.hears(people[1], Ack(pings["10.0.0.1:7645"].nonce))
    view = one.roster.view(MODEL)
    assert set(view.records) == {one.peer, people[0].peer}
    assert view.rtt_of(people[0].peer) == pytest.approx(0.02, abs=1e-6)


def test_a_load_that_rides_on_a_datagram_is_taken(known: One, people: list[Person]) -> None:
    report = LoadReport(NETWORK, people[0].identity.public_key, int(NOW * 1000), queue=9)
    data = people[0].datagram(known.peer, Ping(1), sign_load(report, people[0].identity))
    known.gossip._read(data, "10.0.0.1", 7645)
    (status,) = [status for status in known.roster.status() if status.peer_id == people[0].peer]
    assert status.queue == 9


def test_every_datagram_carries_this_nodes_load(known: One, people: list[Person], clock: Clock) -> None:
    known.hears(people[0], Ping(1))
    [(_, data)] = known.udp.sent
    other = One(clock)
    other.roster.merge(known.roster.signed_of(known.peer), "there")
    other.roster.merge_load(gossip.datagram.read(data, people[0].hash, NETWORK, identity.verify).load)
    assert [status.queue for status in other.roster.status() if status.peer_id == known.peer] == [3]


def test_what_is_sent_and_read_is_counted(known: One, people: list[Person]) -> None:
    before = dict(known.gossip.counts)
    known.hears(people[0], Ping(1))
    counts = known.gossip.counts
    assert counts["datagrams read"] == 1
    assert counts["bytes read"] == len(people[0].datagram(known.peer, Ping(1)))
    assert counts["datagrams sent"] == before["datagrams sent"] + 1
    assert counts["bytes sent"] == before["bytes sent"] + len(known.udp.sent[0][1])
    known.udp.takes = False
    known.hears(people[0], Ping(2))
    assert counts["datagrams sent"] == before["datagrams sent"] + 1, "what the system did not take was not sent"


def test_nothing_is_sent_to_a_member_without_a_record(known: One, people: list[Person]) -> None:
    known.roster._table._drop(people[0].peer)
    known.gossip.handle(Greet(people[0].hash))
    assert known.sent() == []


# --- bad input -----------------------------------------------------------------------------------------------------


def test_a_datagram_of_another_network_or_for_another_node_is_dropped(known: One, people: list[Person]) -> None:
    before = table(known)
    foreign = replace(people[0], network=open_network("another"))
    known.gossip._read(foreign.datagram(known.peer, Ping(1)), "10.0.0.1", 7645)
    known.gossip._read(people[0].datagram(people[1].peer, Ping(1)), "10.0.0.1", 7645)
    assert (known.gossip.counts["dropped: wrong_network"], known.gossip.counts["dropped: wrong_peer"]) == (1, 1)
    assert (known.sent(), table(known)) == ([], before)


def test_truncated_oversize_and_forged_ones_are_dropped(known: One, people: list[Person]) -> None:
    data = people[0].datagram(known.peer, Ping(1, (people[1].claim(9),)))
    before = table(known)
    for n in range(0, len(data), 7):
        known.gossip._read(data[:n], "10.0.0.1", 7645)
    known.gossip._read(bytes(DATAGRAM_BYTES_MAX + 1), "10.0.0.1", 7645)
    counts = known.gossip.counts
    assert counts["dropped: invalid_datagram"] == counts["datagrams read"]
    forged = gossip.datagram.pb.Datagram.FromString(data)
    forged.public_key = people[1].identity.public_key
    known.gossip._read(forged.SerializeToString(), "10.0.0.1", 7645)
    assert counts["dropped: invalid_signature"] == 1
    assert (known.sent(), table(known)) == ([], before)


FUZZED = One(Clock())
FRIEND = Person.create()
FUZZED.knows(FRIEND)
SOUND = FRIEND.datagram(FUZZED.peer, Ping(1, (FRIEND.claim(1),)))


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=DATAGRAM_BYTES_MAX + 8))
def test_random_bytes_change_nothing_and_are_answered_by_nothing(data: bytes) -> None:
    FUZZED.clock.now += 1.0
    FUZZED.sent()
    before = table(FUZZED)
    FUZZED.gossip._read(data, "10.0.0.1", 7645)
    assert (FUZZED.sent(), table(FUZZED)) == ([], before)
    assert FUZZED.gossip.counts["dropped: it failed here"] == 0


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 8 * len(SOUND) - 1))
def test_a_flipped_bit_changes_nothing(bit: int) -> None:
    FUZZED.clock.now += 1.0
    FUZZED.sent()
    data = bytearray(SOUND)
    data[bit // 8] ^= 1 << bit % 8
    before = table(FUZZED)
    FUZZED.gossip._read(bytes(data), "10.0.0.1", 7645)
    assert (FUZZED.sent(), table(FUZZED)) == ([], before)


def test_a_replayed_datagram_changes_nothing_and_is_answered_where_the_first_was(
    known: One, people: list[Person], clock: Clock
) -> None:
    data = people[0].datagram(known.peer, Ping(1, (people[1].claim(9),)))
    known.gossip._read(data, "10.0.0.1", 7645)
    known.sent()
    before, digests = table(known), known.gossip.claim_digests()
    for _ in range(50):
        clock.now += 0.1
        known.gossip._read(data, "6.6.6.6", 666)
    assert (table(known), known.gossip.claim_digests()) == (before, digests)
    assert {address for address, _ in known.sent()} == {"10.0.0.1:7645"}
    old = people[0].datagram(known.peer, Ping(1, (people[1].claim(3),)))
    known.gossip._read(old, "6.6.6.6", 666)
    assert table(known) == before, "and an older word is stale"


def test_a_death_that_was_invented_ends_in_a_refutation(known: One, people: list[Person], clock: Clock) -> None:
    """X is dead, says one about a healthy X: X is suspect, hears of it, and lives."""
    liar, healthy = people[0], people[1]
    known.hears(liar, News((liar.suspicion(healthy),)))
    assert known.state(healthy.peer) is State.SUSPECT
    known.hears(healthy, Ping(1))
    [(address, answer)] = known.sent()
    assert address == healthy.address
    assert liar.suspicion(healthy) in answer.gossip, "it is told"
    known.hears(healthy, News((healthy.claim(1),)))
    assert known.state(healthy.peer) is State.ALIVE
    assert known.roster.view(MODEL).health_of(healthy.peer) is Health.ALIVE
    clock.now += 60
    tick_until(known, clock.now + 0.1, steps=3)
    assert known.state(healthy.peer) is not State.DEAD


def test_this_node_refutes_what_is_said_of_it_and_not_what_was_forged(known: One, people: list[Person]) -> None:
    me = Person(known.identity, incarnation=known.gossip.own_claim().incarnation)
    forged = replace(people[0].suspicion(me), signature=bytes(64))
    known.hears(people[0], News((forged,)))
    assert known.gossip.own_claim().incarnation == me.incarnation
    assert known.gossip.counts["refused: a signature does not fit"] == 1
    known.sent()
    known.hears(people[0], News((people[0].suspicion(me),)))
    assert known.gossip.own_claim().incarnation == me.incarnation + 1
    [(address, answer)] = known.sent()
    assert (address, answer.gossip[0]) == (people[0].address, known.gossip.own_claim())
    known.hears(people[0], News((people[0].suspicion(me, above=10**6),)))
    assert known.gossip.own_claim().incarnation == me.incarnation + 1, "nobody drives it up"


def test_a_flood_from_one_host_is_dropped_before_it_costs_a_verification_and_others_are_heard(
    known: One, people: list[Person], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    real = identity.verify
    monkeypatch.setattr(identity, "verify", lambda *signed: verified.append(1) or real(*signed))
    forged = bytearray(people[0].datagram(known.peer, Ping(1)))
    forged[-1] ^= 1
    for _ in range(int(2 * HOST_PER_S) + 500):
        known.gossip._read(bytes(forged), "6.6.6.6", 666)
    counts = known.gossip.counts
    assert counts["dropped: too many of a host"] == 500
    assert counts["dropped: invalid_signature"] == len(verified) == 2 * HOST_PER_S
    known.hears(people[0], Ping(1), "10.0.0.1")
    assert known.sent() == [(people[0].address, Ack(1))]
    clock.now += 1.0
    for _ in range(int(HOST_PER_S) + 10):
        known.gossip._read(b"junk", "6.6.6.6", 666)
    assert counts["dropped: too many of a host"] == 510, "a thousand a second are looked at"


def test_a_flood_of_one_node_is_dropped_whichever_hosts_it_comes_from(known: One, people: list[Person]) -> None:
    data = people[0].datagram(known.peer, Ping(1))
    for n in range(int(2 * SENDER_PER_S) + 50):
        known.gossip._read(data, f"6.6.6.{n % 250}", 666)
    assert known.gossip.counts["dropped: too many of a node"] == 50
    assert len(known.sent()) == 2 * SENDER_PER_S
    known.hears(people[1], Ping(2))
    assert known.sent() == [(people[1].address, Ack(2))]


def test_nobody_uses_up_what_another_may_send(known: One, people: list[Person]) -> None:
    forged = gossip.datagram.pb.Datagram.FromString(people[0].datagram(known.peer, Ping(1)))
    forged.signature = bytes(64)
    for _ in range(int(2 * SENDER_PER_S) + 50):
        known.gossip._read(forged.SerializeToString(), "6.6.6.6", 666)
    known.hears(people[0], Ping(2))
    assert known.sent() == [(people[0].address, Ack(2))]


def test_as_many_hosts_and_nodes_are_counted_as_the_limit_says(known: One, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(SENDERS_MAX + 10):
        known.gossip._read(b"junk", f"host {n}", 666)
    assert len(known.gossip._hosts) == SENDERS_MAX
    assert known.gossip._senders._senders_max == SENDERS_MAX


def test_a_bug_that_a_datagram_reaches_ends_nothing(
    known: One, people: list[Person], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(known.gossip, "handle", lambda _: 1 / 0)
        known.hears(people[0], Ping(1))
    assert known.gossip.counts["dropped: it failed here"] == 1
    assert "a datagram failed here" in "".join(capsys.readouterr())
    known.hears(people[0], Ping(2))
    assert known.sent() == [(people[0].address, Ack(2))]


# --- strangers -----------------------------------------------------------------------------------------------------


def test_a_stranger_is_answered_by_a_push_pull_alone_where_its_datagram_came_from(
    known: One, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    wishes = Wishes(known)
    stranger = Person.create()
    clock.now += 5
    known.hears(stranger, Ping(1, (stranger.claim(),)), "10.7.7.7", 4567)
    assert known.sent() == []
    assert wishes.peers == [stranger.peer]
    assert known.state(stranger.peer) is None
    assert known.gossip.counts["refused: a message of a node that is no member"] == 1
    dialled = []

    def connect(_: object, address: str, **__: object) -> None:
        dialled.append(address)
        raise WrongPeer("another answers there")

    monkeypatch.setattr("node.gossip.connect", connect)
    known.gossip._guarded(lambda: known.gossip._sync_with(stranger.hash))
    assert dialled == [f"10.7.7.7:4567#{stranger.peer}"], "and Hello must prove who is there"
    assert known.gossip.counts["push-pulls failed"] == 1
    known.gossip._sync_with(stranger.hash)
    assert len(dialled) == 1, "once for each datagram"


def test_an_ipv6_stranger_is_asked_at_an_address_with_brackets(known: One, monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = []
    monkeypatch.setattr("node.gossip.connect", lambda _, address, **__: dialled.append(address))
    stranger = Person.create()
    known.hears(stranger, Ping(1), "fe80::1", 4567)
    with pytest.raises(AttributeError):
        known.gossip._sync_with(stranger.hash)  # what stands for a link here is none
    assert dialled == [f"[fe80::1]:4567#{stranger.peer}"]


def test_invented_identities_take_a_bounded_room_and_make_one_push_pull_a_second(known: One, clock: Clock) -> None:
    wishes = Wishes(known)
    before = table(known)
    clock.now += 5
    strangers = [Person.create() for _ in range(STRANGERS_MAX + 20)]
    for person in strangers:
        known.hears(person, Ping(1, (person.claim(),)), "6.6.6.6", 666)
    assert len(known.gossip._strangers) == STRANGERS_MAX
    assert strangers[0].hash not in known.gossip._strangers, "the oldest is forgotten"
    assert strangers[-1].hash in known.gossip._strangers
    assert len(wishes.peers) == 1
    assert (known.sent(), table(known)) == ([], before)
    clock.now += QUIET.sync_gap_s
    known.hears(strangers[0], Ping(2))
    assert len(wishes.peers) == 2


def test_a_stranger_that_is_admitted_is_asked_at_its_records_address(
    known: One, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialled = []

    def connect(_: object, address: str, **__: object) -> None:
        dialled.append(address)
        raise PeerLost("nobody")

    monkeypatch.setattr("node.gossip.connect", connect)
    stranger = Person.create("10.3.3.3:3")
    known.hears(stranger, Ping(1), "6.6.6.6", 666)
    known.knows(stranger)
    with pytest.raises(PeerLost):
        known.gossip._sync_with(stranger.hash)
    assert dialled == [f"10.3.3.3:3#{stranger.peer}"]
    known.gossip._sync_with(hash_of(Identity.create().peer))
    assert len(dialled) == 1, "nobody asks for what he does not know"


# --- doubts, greetings, claims -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [PeerLost("gone"), DeadlineExceeded("late")])
def test_a_member_that_calls_doubt_is_probed_out_of_turn(
    known: One, people: list[Person], error: Exception, clock: Clock
) -> None:
    clock.now += 0.5
    known.gossip.failed(people[3].peer, error)
    clock.now = max(clock.now, known.gossip._core.deadline)
    known.gossip.handle(Tick())
    assert [address for address, _ in of(known.sent(), Ping)] == [people[3].address]
    assert known.state(people[3].peer) is State.ALIVE, "and nothing else follows"


def test_a_busy_one_is_not_doubted(known: One, people: list[Person]) -> None:
    deadline = known.gossip._core.deadline
    known.gossip.failed(people[3].peer, Overloaded("full"))
    assert (known.gossip._core.deadline, known.sent()) == (deadline, [])
    assert known.health.score(people[3].peer).calls_failed == 1
    known.gossip.failed(Identity.create().peer, PeerLost("a stranger"))


def test_newcomers_are_greeted_a_few_at_once_and_the_others_round_by_round(one: One, clock: Clock) -> None:
    crowd = [Person.create(f"10.1.0.{n}:7645") for n in range(2 * GREETINGS_AT_ONCE_MAX + 3)]
    one.knows(*crowd)
    assert len(of(one.sent(), Ping)) == GREETINGS_AT_ONCE_MAX
    assert not one.gossip._greet
    assert len(one.roster.unanswered()) == len(crowd)


def test_who_joins_a_crowd_fills_no_log_and_hears_of_every_death(
    known: One, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    known.knows(Person.create())
    assert told(capsys, "a peer is alive") == 1
    known.knows(*(Person.create() for _ in range(TOLD_MAX)))
    assert told(capsys, "a peer is alive") == 0
    tick_until(known, known.clock.now + 600.0)
    assert told(capsys, "a peer is dead") > 0


def told(capsys: pytest.CaptureFixture[str], what: str) -> int:
    """How many lines of the log that a person sees say so."""
    return sum("[info" in line and what in line for line in "".join(capsys.readouterr()).splitlines())


def test_this_nodes_newest_claim_is_in_its_digests_at_once(known: One, clock: Clock) -> None:
    other = One(clock)
    exchange(other, known)
    before = known.gossip.claim_digests()
    known.gossip.handle(RecordIssued(known.roster.sequence + 1))
    assert known.gossip._claims.rank_of(known.hash) == known.gossip.own_claim().rank
    assert known.gossip.claim_digests() == before, "a newer record is told by records"


def test_who_is_forgotten_is_in_no_digest(known: One, people: list[Person]) -> None:
    before = known.gossip.claim_digests()
    known.gossip.handle(Forget(people[0].hash))
    assert known.gossip.claim_digests() != before
    assert known.roster.alive().keys() == {person.peer for person in people[1:]}


def test_datagrams_do_not_wait_for_the_signatures_of_a_push_pull(
    known: One, people: list[Person], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    real = identity.verify

    def verify(*signed: bytes) -> None:
        """Meanwhile another thread must get through."""
        other = threading.Thread(target=known.gossip.handle, args=(Tick(),))
        other.start()
        other.join(WAIT_S)
        assert not other.is_alive()
        verified.append(signed)
        real(*signed)

    monkeypatch.setattr(identity, "verify", verify)
    claims = tuple(person.claim(5) for person in people)
    known.gossip.synced(people[0].peer, claims, ())
    assert len(verified) == len(claims), "and none is verified twice"
    assert [known.gossip._core.member(claim.peer).claim for claim in claims] == list(claims)
    known.gossip.synced(people[0].peer, claims, ())
    assert len(verified) == len(claims), "what is not new costs nothing"


def test_eight_thousand_forged_claims_cost_two_verifications(
    known: One, people: list[Person], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []
    real = identity.verify
    monkeypatch.setattr(identity, "verify", lambda *signed: verified.append(1) or real(*signed))
    forged = tuple(replace(people[n % 5].claim(1), incarnation=people[0].incarnation + n + 2) for n in range(8192))
    before = table(known)
    known.gossip.synced(people[0].peer, forged, tuple(people[1].suspicion(people[2]) for _ in range(9)))
    assert len(verified) == 2
    assert table(known) == before
    assert known.gossip.counts["refused: a signature does not fit"] == 1


def test_whether_a_peer_answers_is_what_its_ack_says(one: One, people: list[Person]) -> None:
    one.knows(people[0])
    one.sent()
    assert not one.gossip.answers(people[0].peer, 0.02)
    assert len(of(one.sent(), Ping)) == 2, "one may be lost"
    assert not one.gossip._pings

    class Answering:
        def send(self, address: str, data: bytes) -> bool:
            message = read(data)
            answer = people[0].datagram(one.peer, Ack(message.nonce))
            threading.Thread(target=one.gossip._read, args=(answer, "10.0.0.1", 7645)).start()
            return True

    one.gossip._udp = Answering()
    assert one.gossip.answers(people[0].peer, WAIT_S)


def test_of_two_who_wait_for_one_peers_answer_the_first_to_give_up_takes_nothing_from_the_other(
    one: One, people: list[Person]
) -> None:
    one.knows(people[0])
    waits = threading.Thread(target=lambda: said.append(one.gossip.answers(people[0].peer, WAIT_S)))
    said: list[bool] = []
    waits.start()
    while not one.gossip._pings:
        time.sleep(0.001)  # until the other waits
    assert not one.gossip.answers(people[0].peer, 0.02)
    for _, ping in of(one.sent(), Ping):
        one.gossip._read(people[0].datagram(one.peer, Ack(ping.nonce)), "10.0.0.1", 7645)
    waits.join(WAIT_S / 4)
    assert said == [True]
    assert not one.gossip._pings


def test_whether_a_stranger_answers_nobody_can_say_as_nobody_pings_it(one: One) -> None:
    with pytest.raises(Unavailable, match="no member"):
        one.gossip.answers(Identity.create().peer, 0.02)
    assert not one.gossip._pings


# --- push-pulls ----------------------------------------------------------------------------------------------------


class Wire:
    """A link to another node, which answers in this thread."""

    def __init__(self, asker: One, answerer: One, address: str, reached: bool = True) -> None:
        self.peer, self.address = answerer.peer, address
        self.closed = False
        self.calls: list[str] = []
        self._asker, self._answerer, self._reached = asker, answerer, reached

    def call(self, _: object, request: object, *, timeout_s: float) -> object:
        assert timeout_s > 0
        self.calls.append(type(request).__name__)
        if isinstance(request, pb.SyncRequest):
            return self._answerer.gossip.push_pull.answer(self._asker.peer, "asker", request)
        if not self._reached:
            return pb.DialBackReply(reached=False, why="x" * 10**6)
        return pb.DialBackReply(reached=True)

    def close(self) -> None:
        self.closed = True


def wired(monkeypatch: pytest.MonkeyPatch, wire: Wire) -> Wire:
    monkeypatch.setattr("node.gossip.connect", lambda *_, **__: wire)
    return wire


def test_a_push_pull_makes_members_of_both_and_an_address_that_answered_counts(
    one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = One(clock)
    wire = wired(monkeypatch, Wire(one, other, other.address))
    assert one.gossip._join(other.address) == other.peer
    assert wire.closed
    assert (one.state(other.peer), other.state(one.peer)) == (State.ALIVE, State.ALIVE)
    assert set(one.roster.view(MODEL).records) == {one.peer, other.peer}
    assert set(other.roster.view(MODEL).records) == {other.peer}, "it has not called this one"
    assert wire.calls == ["SyncRequest", "DialBackRequest"], "each brought its own record"
    assert one.gossip.counts["push-pulls"] == 1
    assert one.gossip.reachable.refuted(clock.now) is None
    one.gossip._join(other.address)
    assert wire.calls[2:] == ["SyncRequest"], "equal ones ask once, and nobody is asked twice to call back"


def test_an_address_that_is_not_the_records_proves_nothing_about_the_records(
    one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = One(clock)
    wired(monkeypatch, Wire(one, other, "10.6.6.6:1"))
    one.gossip._join("10.6.6.6:1")
    assert list(one.roster.view(MODEL).records) == [one.peer]


def test_who_says_that_this_node_cannot_be_called_is_believed_and_cut_short(
    one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = One(clock)
    wired(monkeypatch, Wire(one, other, other.address, reached=False))
    one.gossip._join(other.address)
    assert one.gossip.reachable.refuted(clock.now) == "x" * ERROR_MESSAGE_CHARS_MAX


def test_a_node_that_meets_itself_says_nothing_to_itself(one: One, monkeypatch: pytest.MonkeyPatch) -> None:
    wire = wired(monkeypatch, Wire(one, one, one.address))
    assert one.gossip._join(one.address) == one.peer
    assert (wire.calls, wire.closed) == ([], True)


def test_a_node_whose_clock_is_an_hour_off_is_joined_by_nobody_and_told_why(
    one: One, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = Clock()
    ahead.now = NOW + 3600
    other = One(ahead)
    wire = wired(monkeypatch, Wire(other, one, one.address))
    with pytest.raises(RecordFromFuture):
        other.gossip._join(one.address)
    assert wire.closed
    assert (one.state(other.peer), one.roster.record_of(other.peer)) == (None, None)


def test_a_bug_in_a_push_pull_is_told_and_ends_nothing(
    one: One, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one.gossip._guarded(lambda: 1 / 0)
    assert "a push-pull failed here" in "".join(capsys.readouterr())
    assert one.gossip.counts["push-pulls failed"] == 0


# --- tasks ---------------------------------------------------------------------------------------------------------


class Virtual(Clock):
    """trio's clock, which the test lets jump."""

    def __call__(self) -> float:
        return NOW + trio.current_time() - self.begins

    def __init__(self) -> None:
        self.begins = trio.current_time()


def run(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.0))


def test_a_peer_that_never_answers_is_dead_and_one_whose_record_expires_is_forgotten() -> None:
    async def main() -> None:
        one = One(Virtual(), profile=LAN)
        silent, brief = Person.create("10.0.0.1:1"), Person.create("10.0.0.2:2")
        one.roster.merge(brief.record(expires_at_ms=int(NOW * 1000) + 9_000), "there")
        one.knows(silent)
        one.gossip.synced(brief.peer, (brief.claim(),), ())
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.sleep(8.0)
            assert one.state(brief.peer) is not None
            await trio.sleep(2.0)
            assert one.state(brief.peer) is None
            assert one.roster.record_of(brief.peer) is None
            await trio.sleep(50.0)
            assert one.state(silent.peer) is State.DEAD
            assert {status.peer_id: status.state for status in one.roster.status()}[silent.peer] == "dead"
            nursery.cancel_scope.cancel()

    run(main)


def test_strangers_that_are_asked_in_vain_keep_no_member_waiting_and_are_asked_ever_more_rarely() -> None:
    async def main() -> None:
        one = One(Virtual())
        member = Person.create()
        one.knows(member)
        asked: list[tuple[PeerId, int]] = []
        second = 0
        one.gossip._sync_with = lambda peer: asked.append((id_of(peer), second))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            for second in range(300):  # noqa: B007  (for who is asked)
                one.hears(Person.create(), Ping(1), "6.6.6.6", 666)
                await trio.sleep(1.0)
            strangers = [at for peer, at in asked if peer != member.peer]
            assert 5 <= len(strangers) <= 10
            gaps = [after - before for before, after in itertools.pairwise(strangers)]
            assert gaps[0] < 8
            assert max(gaps) <= STRANGER_FAILED_S_MAX + 4
            assert one.gossip._syncs is not None
            one.gossip._syncs.put(member.hash)
            await eventually(lambda: asked[-1] == (member.peer, second))
            nursery.cancel_scope.cancel()

    run(main)


def test_a_deadline_that_a_thread_brings_forward_while_it_is_read_is_not_slept_through(one: One) -> None:
    here = threading.get_ident()

    class Core:
        """Its deadline is far away when the task first reads it; just then a thread brings it forward."""

        claim, peer = one.gossip._core.claim, one.gossip._core.peer
        at = 100.0
        reads = 0

        @property
        def deadline(self) -> float:
            at = NOW + self.at
            if threading.get_ident() == here:
                Core.reads += 1
            if self.reads == 1 and self.at == 100.0:
                thread = threading.Thread(target=one.gossip.handle, args=(Tick(),))
                thread.start()
                thread.join(0.2)  # it is done by then, or waits until the task has let go
            return at

        def handle(self, event: object, now: float) -> list[object]:
            Core.at = 50.0
            return []

    async def main() -> None:
        one.gossip._core = Core()
        one.gossip._sleeps_until = NOW  # of the last sleep
        one.gossip._wake = Inbox(1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.gossip._tick, one.gossip._wake)
            await eventually(lambda: Core.reads >= 2)
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_who_holds_something_and_has_not_answered_is_greeted_round_by_round() -> None:
    async def main() -> None:
        one = One(Virtual(), profile=QUIET)
        crowd = [Person.create(f"10.1.0.{n}:7645") for n in range(2 * GREETINGS_AT_ONCE_MAX)]
        one.knows(*crowd)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.sleep(8.0)
            nursery.cancel_scope.cancel()
        greeted = {address for address, _ in of(one.sent(), Ping)}
        assert greeted == {person.address for person in crowd}

    run(main)


def test_a_new_record_is_told_with_its_sequence() -> None:
    async def main() -> None:
        one = One(Virtual())
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            one.roster.publish(HOLDS[:0])
            await trio.sleep(12.0)
            nursery.cancel_scope.cancel()
        assert one.roster.sequence > int(NOW * 1000)
        assert one.gossip.own_claim().sequence == one.roster.sequence

    run(main)


def test_a_node_that_leaves_tells_others_and_one_that_knows_nobody_just_goes() -> None:
    async def main() -> None:
        one = One(Virtual(), profile=LAN)
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            began = trio.current_time()
            await one.gossip.leave()
            assert trio.current_time() == began
            nursery.cancel_scope.cancel()
        one = One(Virtual(), profile=LAN)
        one.knows(*(Person.create(f"10.0.0.{n}:1") for n in range(1, 5)))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            one.sent()
            await one.gossip.leave()
            nursery.cancel_scope.cancel()
        farewells = [message for _, message in of(one.sent(), News) if one.gossip.own_claim() in message.gossip]
        assert len(farewells) >= 3
        assert one.gossip.own_claim().left

    run(main)


def test_a_list_of_revocations_that_is_new_goes_to_a_few_at_once() -> None:
    async def main() -> None:
        operator, own = Identity.create(), Identity.create()
        network = permissioned(operator.public_key)
        now_ms = int(NOW * 1000)

        def granted(peer: PeerId) -> bytes:
            return grants.sign(Grant(peer, now_ms, now_ms + 3_600_000), operator)

        one = One(Virtual(), identity=own, network=network, grant=granted(own.peer))
        crowd = [Person.create(network=network) for _ in range(8)]
        for person in crowd:
            one.roster.merge(person.record(grant=granted(person.peer)), "there")
        one.gossip.synced(crowd[0].peer, tuple(person.claim() for person in crowd), ())
        asked = []
        one.gossip._sync_with = lambda peer: asked.append(id_of(peer))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.sleep(0.2)
            asked.clear()
            at_ms = {crowd[0].peer: now_ms}
            one.roster.merge_revocations(revocations.sign(Revocations(1, now_ms, at_ms), operator))
            await eventually(lambda: len(asked) >= 3)
            assert crowd[0].peer not in asked
            assert one.state(crowd[0].peer) is None, "and who is put out is no member"
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_node_that_cannot_be_called_asks_by_push_pulls_since_no_answer_reaches_it() -> None:
    async def main() -> None:
        one = One(Virtual())
        person = Person.create()
        one.knows(person)
        one.gossip.set_deaf(True)
        asked = []
        one.gossip._sync_with = lambda peer: asked.append(id_of(peer))
        one.sent()
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await eventually(lambda: person.peer in asked)
            nursery.cancel_scope.cancel()
        assert not of(one.sent(), Ping)

    trio.run(main)


async def eventually(holds: Callable[[], bool]) -> None:
    with trio.fail_after(WAIT_S):
        while not holds():  # noqa: ASYNC110  (threads do it, and tell nobody)
            await trio.sleep(0.001)


def test_so_many_push_pulls_are_under_way_at_once_so_many_wait_and_no_more() -> None:
    async def main() -> None:
        one = One(Clock())
        may_end, under_way, done = threading.Event(), [], []

        def sync(peer: bytes) -> None:
            under_way.append(peer)
            assert may_end.wait(WAIT_S)
            done.append(peer)

        one.gossip._sync_with = sync
        peers = [hash_of(Identity.create().peer) for _ in range(SYNCS_AT_ONCE_MAX + SYNCS_WAITING_MAX + 5)]
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            for peer in peers[:SYNCS_AT_ONCE_MAX]:
                one.gossip._syncs.put(peers[0])  # asked for again and again, done once
                one.gossip._syncs.put(peer)
                await eventually(lambda wanted=peer: wanted in under_way)
            for peer in peers[SYNCS_AT_ONCE_MAX:]:
                one.gossip._syncs.put(peer)
            await trio.testing.wait_all_tasks_blocked()
            assert len(under_way) == len(one.gossip._syncing) == SYNCS_AT_ONCE_MAX
            assert len(one.gossip._syncs) == SYNCS_WAITING_MAX
            may_end.set()
            await eventually(lambda: not one.gossip._syncing and not len(one.gossip._syncs))
            nursery.cancel_scope.cancel()
        assert len(done) == len(set(done))
        assert SYNCS_WAITING_MAX <= len(done) <= SYNCS_AT_ONCE_MAX + SYNCS_WAITING_MAX

    trio.run(main)


def test_join_is_a_push_pull_in_a_thread_of_its_own(one: One, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    other = One(clock)
    wired(monkeypatch, Wire(one, other, other.address))
    assert trio.run(one.gossip.join, other.address) == other.peer
    assert one.state(other.peer) is State.ALIVE


def test_events_of_other_threads_wake_the_task_that_ticks() -> None:
    """A node that knows nobody has nothing to do for long: what a thread brings must not wait as long."""

    class Running(Clock):
        def __call__(self) -> float:
            return NOW + time.monotonic() - self.now

        def __init__(self) -> None:
            self.now = time.monotonic()

    async def main() -> None:
        one = One(Running(), profile=replace(LAN, probe_period_s=1000.0, probe_timeout_s=500.0))
        async with trio.open_nursery() as nursery:
            await nursery.start(one.gossip.run)
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(one.knows, Person.create("10.0.0.1:1"))
            await eventually(lambda: any(isinstance(message, News) for _, message in one.sent()))
            nursery.cancel_scope.cancel()

    trio.run(main)
