"""PROTOCOL.md section 15: probes that a node makes for others."""

from __future__ import annotations

from dataclasses import replace

import pytest
from toy_membership import QUIET, census, core, peer, sent

from node.membership_effect import Refusal, Refused, Send
from node.membership_event import Received, Tick
from node.message import Ack, Nack, Ping, PingRequest


def test_a_helper_pings_passes_the_ack_on_and_knows_the_askers_nonce() -> None:
    node = core(0, census(4), profile=QUIET)
    [ping] = sent(node.handle(Received(peer(1), PingRequest(77, peer(2))), 0.1), Ping)
    assert ping.to == peer(2)
    assert not node.handle(Received(peer(3), Ack(ping.message.nonce)), 0.2)
    [ack] = node.handle(Received(peer(2), Ack(ping.message.nonce)), 0.2)
    assert ack == Send(peer(1), Ack(77, ack.message.gossip))
    assert not node.handle(Received(peer(2), Ack(ping.message.nonce)), 0.2)


def test_a_helper_says_nack_in_time_and_still_passes_a_late_ack_on() -> None:
    node = core(0, census(4), profile=replace(QUIET, probe_period_s=100.0, probe_timeout_s=0.5))
    [ping] = sent(node.handle(Received(peer(1), PingRequest(77, peer(2))), 0.0), Ping)
    assert node.deadline == pytest.approx(0.4)
    [nack] = sent(node.handle(Tick(), 0.4), Nack)
    assert (nack.to, nack.message.nonce) == (peer(1), 77)
    assert [a.message.nonce for a in sent(node.handle(Received(peer(2), Ack(ping.message.nonce)), 0.7), Ack)] == [77]


def test_a_helper_without_nacks_is_silent_and_forgets_after_a_period() -> None:
    node = core(0, census(4), profile=replace(QUIET, nacks=False))
    [ping] = sent(node.handle(Received(peer(1), PingRequest(77, peer(2))), 0.0), Ping)
    assert not sent(node.handle(Tick(), 0.4), Nack)
    node.handle(Tick(), 1.5)
    assert not node.handle(Received(peer(2), Ack(ping.message.nonce)), 1.6)


def test_a_helper_that_is_itself_the_target_answers_and_one_that_does_not_know_it_is_silent() -> None:
    node = core(0, census(4), profile=QUIET)
    assert [a.message.nonce for a in sent(node.handle(Received(peer(1), PingRequest(77, peer(0))), 0.1), Ack)] == [77]
    assert not node.handle(Received(peer(1), PingRequest(78, peer(99))), 0.1)


def test_probes_for_others_are_limited_and_the_one_too_many_is_named() -> None:
    node = core(0, census(4), profile=replace(QUIET, relays_max=3))
    effects = [node.handle(Received(peer(1), PingRequest(n, peer(2))), 0.1) for n in range(4)]
    assert [len(sent(one, Ping)) for one in effects] == [1, 1, 1, 0]
    assert effects[3] == [Refused(peer(1), Refusal.BUSY)]
    node.handle(Tick(), 0.6)
    effects = [node.handle(Received(peer(1), PingRequest(n, peer(2))), 0.7) for n in range(4, 7)]
    assert [len(sent(one, Ping)) for one in effects] == [1, 1, 1]
    node.handle(Tick(), 1.2)  # the first three, whose Nacks are sent, make room for these
    assert [len(sent(node.handle(Received(peer(1), PingRequest(9, peer(2))), 1.2), Ping))] == [1]
