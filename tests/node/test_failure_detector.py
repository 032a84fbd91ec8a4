"""PROTOCOL.md section 15: whom a node probes, and what it makes of an answer or of silence."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from toy_membership import QUIET, START, census, claim, core, of, peer, probe, sent, state, tick_until

from node.member import State
from node.membership_effect import Answered, Changed
from node.membership_event import Doubt, Forget, Greet, Received, Tick
from node.message import Ack, Gossip, Ping, PingRequest
from node.profile import LAN

if TYPE_CHECKING:
    from node.claim import Claim


def test_every_member_is_probed_within_one_round() -> None:
    node = core(0, census(8), profile=QUIET)
    targets = []
    for _ in range(7):
        now, ping = probe(node)
        targets.append(ping.to)
        node.handle(Received(ping.to, Ack(ping.message.nonce)), now + 0.01)
    assert sorted(targets) == sorted(map(peer, range(1, 8)))


def test_a_probe_goes_direct_then_through_helpers_then_makes_a_suspect() -> None:
    node = core(0, census(6), profile=QUIET)
    now, ping = probe(node)
    assert node.deadline == now + LAN.probe_timeout_s
    asked = sent(node.handle(Tick(), node.deadline), PingRequest)
    assert len({send.to for send in asked}) == LAN.helpers
    assert ping.to not in {send.to for send in asked}
    assert all(send.message.target == ping.to for send in asked)
    effects = tick_until(node, now + LAN.probe_period_s)
    assert of(effects, Changed) == [Changed(ping.to, State.ALIVE, State.SUSPECT, START, node.member(ping.to).claim)]


def test_an_ack_that_a_helper_passes_on_ends_the_probe() -> None:
    node = core(0, census(6), profile=QUIET)
    now, _ = probe(node)
    asked = sent(node.handle(Tick(), now + LAN.probe_timeout_s), PingRequest)
    assert not of(node.handle(Received(asked[0].to, Ack(asked[0].message.nonce)), now + 0.6), Answered)
    assert not of(tick_until(node, now + LAN.probe_period_s), Changed)


def test_an_answer_tells_the_round_trip() -> None:
    node = core(0, census(3), profile=QUIET)
    now, ping = probe(node)
    [answered] = of(node.handle(Received(ping.to, Ack(ping.message.nonce)), now + 0.25), Answered)
    assert (answered.peer, answered.rtt_s) == (ping.to, pytest.approx(0.25))


def test_an_ack_of_another_nonce_or_of_one_who_was_not_asked_ends_nothing() -> None:
    node = core(0, census(6), profile=QUIET)
    now, ping = probe(node)
    other = next(p for p in map(peer, range(1, 6)) if p != ping.to)
    node.handle(Received(ping.to, Ack(ping.message.nonce ^ 1)), now)
    node.handle(Received(other, Ack(ping.message.nonce)), now)
    tick_until(node, now + LAN.probe_period_s)
    assert node.member(ping.to).state == State.SUSPECT


def test_a_member_that_calls_doubt_is_probed_next_and_not_more_often_than_twice_in_a_period() -> None:
    node = core(0, census(200), profile=QUIET)
    now, first = probe(node)
    node.handle(Received(first.to, Ack(first.message.nonce)), now)
    doubted = [p for p in map(peer, range(1, 9)) if p != first.to][:3]
    for each in doubted:
        node.handle(Doubt(each), now)
    times = []
    for each in doubted:
        at, ping = probe(node)
        assert ping.to == each
        node.handle(Received(each, Ack(ping.message.nonce)), at)
        times.append(at)
    assert times[0] == pytest.approx(now + LAN.probe_period_s / 2)
    assert all(later - earlier >= LAN.probe_period_s / 2 for earlier, later in itertools.pairwise(times))


def test_doubt_about_a_stranger_the_dead_or_who_is_being_probed_changes_nothing() -> None:
    node = core(0, census(200), profile=replace(QUIET, doubted_max=2))
    now, ping = probe(node)
    node.handle(Received(peer(5), Gossip((claim(6, START + 1, left=True),))), now)
    for each in (ping.to, peer(6), peer(999)):
        node.handle(Doubt(each), now)
    others = [p for p in map(peer, range(7, 20)) if p != ping.to]
    for each in others[:3]:  # one more than there is room for
        node.handle(Doubt(each), now)
    node.handle(Received(peer(5), Gossip((claim_of_left(others[0]),))), now)
    node.handle(Received(ping.to, Ack(ping.message.nonce)), now)
    probed = []
    for _ in range(3):
        at, next_ping = probe(node)
        probed.append(next_ping.to)
        node.handle(Received(next_ping.to, Ack(next_ping.message.nonce)), at)
    assert probed[0] == others[1]  # the first one has left meanwhile
    assert others[2] not in probed[:1]


def claim_of_left(who: bytes) -> Claim:
    number = next(number for number in range(1000) if peer(number) == who)
    return claim(number, START + 1, left=True)


def test_a_greeting_that_is_answered_tells_the_round_trip_and_silence_means_nothing() -> None:
    node = core(0, census(6), profile=replace(QUIET, greetings_max=2))
    [ping] = sent(node.handle(Greet(peer(1)), 0.0), Ping)
    assert ping.to == peer(1)
    assert node.handle(Received(peer(2), Ack(ping.message.nonce)), 0.1) == []
    assert node.handle(Received(peer(1), Ack(ping.message.nonce)), 0.25) == [Answered(peer(1), 0.25)]
    assert node.handle(Received(peer(1), Ack(ping.message.nonce)), 0.3) == []
    nonces = [sent(node.handle(Greet(peer(n)), 0.4), Ping)[0].message.nonce for n in (1, 2, 3)]
    assert node.handle(Received(peer(1), Ack(nonces[0])), 0.5) == []  # the oldest of more than there is room for
    assert of(node.handle(Received(peer(3), Ack(nonces[2])), 0.5), Answered)
    assert node.handle(Greet(peer(99)), 0.5) == []


def test_a_node_that_knows_nobody_probes_nobody() -> None:
    node = core(0)
    assert tick_until(node, 10.0) == []
    assert len(node) == 1


def test_a_probe_of_one_who_left_meanwhile_fails_without_a_word() -> None:
    node = core(0, census(3), profile=QUIET)
    now, ping = probe(node)
    number = 1 if ping.to == peer(1) else 2
    node.handle(Received(ping.to, Gossip((claim(number, START + 1, left=True),))), now)
    tick_until(node, now + 1.5)
    assert state(node, number) == State.LEFT
    assert node.health == 0


def test_a_member_that_is_forgotten_during_its_probe_is_suspected_by_nobody() -> None:
    node = core(0, census(3), profile=QUIET)
    now, ping = probe(node)
    node.handle(Forget(ping.to), now)
    tick_until(node, now + 3)
    assert ping.to not in {suspicion.subject for suspicion in node.suspicions()}
