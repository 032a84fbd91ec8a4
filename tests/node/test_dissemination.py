"""PROTOCOL.md section 15: what rides on messages, and what is told without being asked."""

from __future__ import annotations

from dataclasses import replace

from toy_membership import QUIET, START, census, claim, core, peer, sent, suspicion, tick_until

from node.membership_effect import Refusal, Refused
from node.membership_event import Leave, Received, RecordIssued, Synced
from node.message import Ack, Gossip, Ping, PingRequest
from node.profile import LAN


def test_a_ping_to_a_suspect_carries_the_suspicion_first_and_without_buddies_it_does_not() -> None:
    for buddy in (True, False):
        node = core(0, census(2), profile=replace(QUIET, buddy=buddy))
        node.handle(Synced(peer(1), (claim(2),)), 0.0)
        node.handle(Received(peer(2), Gossip((suspicion(1, 2),))), 0.0)
        [ack] = sent(node.handle(Received(peer(1), Ping(1)), 0.1), Ack)
        urgent = (claim(1), suspicion(1, 2))
        assert (claim(1) in ack.message.gossip) == buddy
        assert not buddy or set(urgent) <= set(ack.message.gossip)


def test_a_node_that_leaves_says_so_at_once_and_then_falls_silent() -> None:
    node = core(0, census(12))
    node.handle(Received(peer(1), Gossip((claim(2, START, 2),))), 0.0)
    effects = node.handle(Leave(), 1.0)
    farewell = claim(0, START + 1, left=True)
    assert [send.message.gossip for send in sent(effects, Gossip)] == [(farewell,)] * 3
    node.handle(Received(peer(1), Gossip((claim(3, START + 1),))), 1.1)
    [ack] = node.handle(Received(peer(1), Ping(1, (suspicion(0, 1, START + 1),))), 1.1)
    assert ack.message.gossip == (farewell,)
    assert node.handle(Received(peer(1), PingRequest(1, peer(3))), 1.1) == []
    assert node.handle(Received(peer(99), Ping(1)), 1.1) == [Refused(peer(99), Refusal.STRANGER)]
    assert node.handle(Leave(), 1.2) == []
    told = tick_until(node, 100.0)
    assert {type(effect.message) for effect in told} == {Gossip}
    assert node.deadline is None


def test_a_farewell_without_a_gossip_timer_is_told_at_once() -> None:
    node = core(0, census(6), profile=QUIET)
    assert len(sent(node.handle(Leave(), 1.0), Gossip)) == 3
    assert node.deadline is None


def test_a_push_pull_that_brings_many_passes_few_on() -> None:
    node = core(0, profile=replace(QUIET, synced_broadcasts_max=5))
    node.handle(Synced(peer(1), tuple(claim(n) for n in range(1, 101))), 0.0)
    node.handle(Synced(peer(1), tuple(claim(n, START + 1) for n in range(50, 101))), 0.0)
    told = set()
    for nonce in range(100):
        [ack] = sent(node.handle(Received(peer(1), Ping(nonce)), 0.0), Ack)
        told |= {item.peer for item in ack.message.gossip}
    assert len(told) == 11  # five of each push-pull, and this node


def test_items_beyond_the_limit_are_not_looked_at() -> None:
    node = core(0, census(20), profile=QUIET)
    node.handle(Received(peer(1), Gossip(tuple(claim(n, START + 1) for n in range(2, 20)))), 0.0)
    assert sum(member.claim.incarnation > START for member in node.members()) == QUIET.items_max


def test_a_new_record_is_told_with_its_sequence_and_an_older_one_lowers_nothing() -> None:
    node = core(0, census(3), profile=QUIET)
    node.handle(RecordIssued(7), 0.0)
    assert node.claim == claim(0, START, 7)
    node.handle(RecordIssued(3), 0.0)
    assert node.claim == claim(0, START, 7)
    [ack] = sent(node.handle(Received(peer(1), Ping(1)), 0.0), Ack)
    assert ack.message.gossip == (claim(0, START, 7),)


def test_a_node_of_the_census_has_nothing_to_tell_and_another_tells_its_claim() -> None:
    assert not sent(tick_until(core(0, census(3)), 0.9), Gossip)
    assert sent(tick_until(core(0, census(3), sequence=2), 0.9), Gossip)
    assert core(0, census(3)).peer == peer(0)


def test_news_is_sent_to_a_few_until_it_has_been_told_often_enough() -> None:
    node = core(0, census(9), profile=replace(LAN, probe_period_s=1000.0, probe_timeout_s=500.0, sync_period_s=9000.0))
    node.handle(Received(peer(1), Gossip((claim(2, START + 1),))), 0.0)
    told = sent(tick_until(node, 20.0), Gossip)
    assert len(told) == LAN.retransmit_multiplier  # ceil(log10(9 + 1)) = 1
    assert all(send.message.gossip == (claim(2, START + 1),) for send in told)
