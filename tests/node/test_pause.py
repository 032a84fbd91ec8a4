"""PROTOCOL.md section 15: a process that stood still judges nobody by that time."""

from __future__ import annotations

from dataclasses import replace

from toy_membership import answered_until, census, core, of, peer, probe, state, suspicion

from node.member import State
from node.membership_effect import Answered
from node.membership_event import Received, Tick
from node.message import Ack, Gossip, Ping
from node.profile import LAN


def test_a_node_that_stood_still_judges_nobody_by_that_time() -> None:
    node = core(0, census(6))
    node.handle(Received(peer(2), Gossip((suspicion(1, 2),))), 0.0)
    now, ping = probe(node)
    assert node.handle(Tick(), now + 60) is not None  # stopped for a minute, and the first thing is a timer
    assert state(node, 1) == State.SUSPECT
    assert node.health == 1
    assert node.member(ping.to).state in (State.ALIVE, State.SUSPECT)
    effects = node.handle(Received(ping.to, Ack(ping.message.nonce)), now + 60.01)
    assert not of(effects, Answered)  # how long it took is unknown
    assert node.health == 0


def test_a_pause_is_counted_once_whatever_is_handled_first() -> None:
    node = core(0, census(6))
    node.handle(Received(peer(2), Gossip((suspicion(1, 2),))), 0.0)
    for _ in range(5):
        node.handle(Received(peer(2), Ping(1)), 60.0)
    assert node.health == 1
    while state(node, 1) == State.SUSPECT:
        answered_until(node, node.deadline)
    assert node.deadline < 60 + 6 * 4 + 2


def test_a_node_that_stood_still_between_probes_only_waits() -> None:
    node = core(0, census(6))
    node.handle(Tick(), 100.0)
    assert node.health == 1
    assert node.deadline <= 101.0


def test_without_that_part_a_late_timer_is_a_verdict() -> None:
    node = core(0, census(3), profile=replace(LAN, pause_s=0.0))
    now, ping = probe(node)
    node.handle(Tick(), now + 60)
    assert node.member(ping.to).state == State.SUSPECT
