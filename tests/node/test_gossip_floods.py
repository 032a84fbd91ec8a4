"""The driver of membership, without a network: what floods cost, and that others are heard meanwhile."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

from toy_gossip import WAIT_S, Clock, One, Person, table

from node import gossip, identity
from node.gossip import HOST_PER_S, SENDER_PER_S, SENDERS_MAX
from node.membership_event import Tick
from node.message import Ack, Ping

if TYPE_CHECKING:
    import pytest


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
