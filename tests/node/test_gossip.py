"""The driver of membership, without a network: where datagrams go, and what they carry."""

from __future__ import annotations

import pytest
from toy_gossip import MODEL, NOW, Clock, One, Person, of

from node import gossip, identity
from node.load_report import LoadReport
from node.load_report import sign as sign_load
from node.membership_event import Greet
from node.message import Ack, Nack, Ping, PingRequest
from node.message import Gossip as News
from node.network import open_network

NETWORK = open_network().id


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
