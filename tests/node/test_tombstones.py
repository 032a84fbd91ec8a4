"""PROTOCOL.md section 15: the dead and the left, until they are forgotten or come back."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from toy_membership import QUIET, START, census, claim, core, of, peer, sent, state, suspicion, tick_until

from node.claim import Suspicion
from node.member import State
from node.membership_effect import Changed, Forgotten, Sync
from node.membership_event import Received, Synced, Tick
from node.message import Ack, Gossip, Ping

if TYPE_CHECKING:
    from node.membership import Membership


def with_a_dead(profile=QUIET) -> Membership:
    """Node 0, for whom 1 is dead, at time 100."""
    node = core(0, census(4), profile=replace(profile, probe_period_s=5.0, probe_timeout_s=2.0))
    node.handle(Received(peer(2), Gossip(tuple(suspicion(1, n) for n in (2, 3)))), 0.0)
    for number in (2, 3):
        node.handle(Received(peer(number), Gossip((claim(number, START, 2),))), 0.0)
    while node.deadline < 100:
        now = node.deadline
        for send in sent(node.handle(Tick(), now), Ping):
            if send.to != peer(1):
                node.handle(Received(send.to, Ack(send.message.nonce)), now)
    assert state(node, 1) == State.DEAD
    return node


def test_a_peer_that_is_thought_dead_and_pings_is_told_so() -> None:
    node = with_a_dead()
    [ack] = sent(node.handle(Received(peer(1), Ping(3)), 100.0), Ack)
    assert ack.message.gossip[0] == claim(1)
    assert [item.subject for item in ack.message.gossip if isinstance(item, Suspicion)] == [peer(1)]


def test_a_peer_that_is_thought_dead_and_says_something_is_told_once_in_a_period() -> None:
    node = with_a_dead()
    assert len(sent(node.handle(Received(peer(1), Gossip()), 100.0), Gossip)) == 1
    assert node.handle(Received(peer(1), Gossip()), 100.0) == []
    assert len(sent(node.handle(Received(peer(1), Gossip()), 106.0), Gossip)) == 1


def test_the_dead_are_probed_now_and_then() -> None:
    node = with_a_dead(replace(QUIET, dead_probe_period_s=10.0))
    pings = [send for send in sent(tick_until(node, 130.0), Ping) if send.to == peer(1)]
    assert 2 <= len(pings) <= 6
    assert all(claim(1) in send.message.gossip for send in pings)


def test_only_a_higher_incarnation_raises_the_dead_and_it_may_bring_a_partition_along() -> None:
    node = with_a_dead()
    node.handle(Received(peer(2), Gossip((claim(1, START, 5),))), 100.0)
    assert state(node, 1) == State.DEAD
    effects = node.handle(Received(peer(2), Gossip((claim(1, START + 1, 5),))), 110.0)
    assert of(effects, Changed)[0].after == State.ALIVE
    assert Sync(peer(2)) in effects


def test_tombstones_are_forgotten_in_time_and_late_claims_do_not_raise_them_before() -> None:
    node = with_a_dead()
    assert node.handle(Synced(peer(2), (claim(1),)), 101.0) == []
    effects = node.handle(Tick(), 5000.0)
    assert Forgotten(peer(1)) in effects
    assert node.member(peer(1)) is None
    assert dict(node.differences())[peer(1)] is None
    assert peer(1) not in {member.claim.peer for member in node.members()}


def test_the_oldest_tombstones_go_when_there_are_too_many() -> None:
    node = core(0, census(6), profile=replace(QUIET, tombstones_max=2))
    farewells = [claim(n, START + 1, left=True) for n in (1, 2, 3)]
    effects = node.handle(Received(peer(4), Gossip(tuple(farewells))), 0.0)
    assert of(effects, Forgotten) == [Forgotten(peer(1))]
    assert len(node) == 3


def test_what_has_left_is_suspected_by_nobody_and_comes_back_by_a_higher_incarnation() -> None:
    node = core(0, census(6), profile=QUIET)
    node.handle(Received(peer(1), Gossip((claim(1, START + 1, left=True),))), 0.0)
    node.handle(Received(peer(2), Gossip((suspicion(1, 2, START + 1), claim(1, START + 1, 9)))), 0.0)
    assert state(node, 1) == State.LEFT
    node.handle(Received(peer(2), Gossip((claim(1, START + 2),))), 0.0)
    assert state(node, 1) == State.ALIVE
