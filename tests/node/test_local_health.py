"""PROTOCOL.md section 15: what makes a node ill by its own reckoning, and what that stretches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_membership import QUIET, START, census, core, peer, probe, sent, suspicion, table, tick_until

from node.member import State
from node.membership_effect import Changed
from node.membership_event import Received, Tick
from node.message import Ack, Gossip, Nack, PingRequest
from node.profile import LAN, PLAIN_SWIM


def test_helpers_that_say_nack_speak_for_the_asker_and_silent_ones_against_it() -> None:
    for silent in range(4):
        node = core(0, census(6), profile=QUIET)
        now, _ = probe(node)
        asked = sent(node.handle(Tick(), now + LAN.probe_timeout_s), PingRequest)
        for send in asked[silent:]:
            node.handle(Received(send.to, Nack(send.message.nonce)), now + 0.95)
            node.handle(Received(send.to, Nack(send.message.nonce)), now + 0.95)
        tick_until(node, now + LAN.probe_period_s)
        assert node.health == silent


def test_a_nack_that_nobody_asked_for_changes_nothing() -> None:
    node = core(0, census(6), profile=QUIET)
    before = table(node)
    node.handle(Received(peer(1), Nack(5)), 0.0)
    assert table(node) == before


def test_ill_health_stretches_period_and_timeout_and_an_answer_heals() -> None:
    node = core(0, census(6), profile=QUIET)
    now, ping = probe(node)
    tick_until(node, now + LAN.probe_period_s - 0.01)
    now, ping = probe(node)
    assert node.health == 3
    assert node.deadline == pytest.approx(now + 4 * LAN.probe_timeout_s)
    node.handle(Received(ping.to, Ack(ping.message.nonce)), now)
    assert node.health == 2
    later, _ = probe(node)
    assert later == pytest.approx(now + 4 * LAN.probe_period_s)


def test_health_stays_below_its_maximum() -> None:
    node = core(0, census(20), profile=replace(QUIET, suspicion_multiplier=10))
    tick_until(node, 60.0)
    assert node.health == LAN.health_max - 1


def test_without_lifeguard_health_is_always_well() -> None:
    node = core(0, census(20), profile=PLAIN_SWIM)
    tick_until(node, 20.0)
    assert node.health == 0


def test_local_ill_health_gives_suspects_more_time() -> None:
    plain, patient = (core(0, census(60), profile=replace(QUIET, suspicion_stretch_max=most)) for most in (1.0, 4.0))
    died = []
    for node in (plain, patient):
        effects = [(0.0, e) for e in node.handle(Received(peer(2), Gossip((suspicion(1, 2),))), 0.0)]
        while not any(isinstance(e, Changed) and e.peer == peer(1) and e.after == State.DEAD for _, e in effects):
            now = node.deadline
            effects += [(now, e) for e in node.handle(Tick(), now)]
        died.append(now)
    assert died[1] > 1.5 * died[0]


def test_one_accuser_alone_talks_no_node_ill_however_often_it_accuses() -> None:
    node = core(1, census(4), profile=QUIET)
    for second in range(100):
        accused = suspicion(1, 2, node.claim.incarnation)
        node.handle(Received(peer(2), Gossip((accused,))), float(second))
    assert node.claim.incarnation == START + 100, "each is refuted"
    assert node.health == 1
    node.handle(Received(peer(3), Gossip((suspicion(1, 3, node.claim.incarnation),))), 100.0)
    assert node.health == 2, "another's word counts"
    node.handle(Received(peer(2), Gossip((suspicion(1, 2, node.claim.incarnation),))), 1 + QUIET.accuser_gap_s)
    assert node.health == 3, "and so does the first one's, in time"


def test_a_crowd_of_accusers_counts_no_more_than_health_has_steps() -> None:
    node = core(1, census(40), profile=QUIET)
    for number in range(2, 40):
        node.handle(Received(peer(2), Gossip((suspicion(1, number, node.claim.incarnation),))), float(number))
        if number == 20:
            node._health.change(-99)
    assert node.health == 0
    later = 40.0 + QUIET.accuser_gap_s
    node.handle(Received(peer(2), Gossip((suspicion(1, 2, node.claim.incarnation),))), later)
    assert node.health == 1
