"""The driver of membership, without a network: what datagrams that are broken, forged or replayed get."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toy_gossip import MODEL, Clock, One, Person, table, tick_until

from coordinator.view import Health
from node import gossip
from node.member import State
from node.message import Ack, Ping
from node.message import Gossip as News
from node.network import open_network
from protos.limits import DATAGRAM_BYTES_MAX

if TYPE_CHECKING:
    import pytest


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
