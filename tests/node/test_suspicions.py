"""PROTOCOL.md section 15: which suspicions count, and how long they last."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from toy_membership import (
    QUIET,
    START,
    answered_until,
    census,
    claim,
    core,
    of,
    peer,
    sent,
    state,
    suspicion,
    table,
    tick_until,
)

from node.claim import Suspicion
from node.member import State
from node.membership_effect import Changed, Refusal, Refused, Sync
from node.membership_event import Received, Synced
from node.message import Ack, Gossip, Ping


def suspected(count: int, accusers: int, **changed: object) -> float | None:
    """When a node that hears of so many accusers of peer 1 at 0 believes it dead."""
    node = core(0, census(count), profile=replace(QUIET, probe_period_s=1000.0, probe_timeout_s=500.0, **changed))
    node.handle(Received(peer(2), Gossip(tuple(suspicion(1, 2 + n) for n in range(accusers)))), 0.0)
    now = None
    while state(node, 1) == State.SUSPECT:
        now = node.deadline
        answered_until(node, now)
    return now


def test_a_suspicion_lasts_the_longer_time_alone_and_the_shorter_with_all_confirmations() -> None:
    shortest = 4 * math.log10(100) * 1000
    assert suspected(100, 1) == pytest.approx(6 * shortest)
    assert suspected(100, 2) == pytest.approx(6 * shortest - 5 * shortest * math.log(2) / math.log(3))
    assert suspected(100, 3) == pytest.approx(shortest)
    assert suspected(100, 4) == pytest.approx(shortest)


def test_among_few_and_without_confirmations_a_suspicion_lasts_the_shorter_time() -> None:
    assert suspected(3, 1) == pytest.approx(4 * 1000)
    assert suspected(100, 1, suspicion_max_multiplier=1) == pytest.approx(4 * 2 * 1000)


def test_an_accuser_counts_once_and_what_a_timer_needs_not_is_not_kept() -> None:
    node = core(0, census(100), profile=QUIET)
    for accuser in (2, 2, 3, 4, 5):
        node.handle(Received(peer(2), Gossip((suspicion(1, accuser),))), 0.0)
    assert [s.accuser for s in node.suspicions()] == [peer(2), peer(3), peer(4)]


def test_accusers_are_kept_up_to_their_limit() -> None:
    node = core(0, census(100), profile=replace(QUIET, suspicion_multiplier=10, accusers_max=4))
    node.handle(Received(peer(2), Gossip(tuple(suspicion(1, accuser) for accuser in range(2, 10)))), 0.0)
    assert len(list(node.suspicions())) == 4


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("an accuser who is no member", suspicion(1, 99)),
        ("the subject itself", suspicion(1, 1)),
        ("this node, which said no such thing", suspicion(1, 0)),
        ("about an older incarnation", suspicion(1, 2, START - 1)),
        ("about a stranger", suspicion(99, 2)),
        ("forged", replace(suspicion(1, 2), signature=bytes(64))),
    ],
)
def test_a_suspicion_that_does_not_count_changes_nothing(what: str, changed: Suspicion) -> None:
    node = core(0, census(6), profile=QUIET)
    before = table(node)
    effects = node.handle(Received(peer(3), Gossip((changed,))), 0.0)
    assert table(node) == before, what
    assert effects == ([Refused(peer(3), Refusal.FORGED)] if what == "forged" else [])


def test_an_accuser_counts_only_while_it_is_believed_alive() -> None:
    node = core(0, census(6), profile=QUIET)
    node.handle(Received(peer(3), Gossip((suspicion(2, 3),))), 0.0)
    node.handle(Received(peer(3), Gossip((suspicion(1, 2),))), 0.0)
    assert (state(node, 2), state(node, 1)) == (State.SUSPECT, State.ALIVE)


def test_a_suspicion_of_a_newer_incarnation_waits_for_its_claim() -> None:
    node = core(0, census(6), profile=QUIET)
    effects = node.handle(Received(peer(3), Gossip((suspicion(1, 2, START + 1),))), 0.0)
    assert effects == [Sync(peer(3))]
    node.handle(Synced(peer(3), (claim(1, START + 1),), (suspicion(1, 2, START + 1),)), 0.1)
    assert state(node, 1) == State.SUSPECT


def test_a_suspect_that_refutes_lives_and_its_accusers_are_told_no_more() -> None:
    node = core(0, census(6), profile=QUIET)
    node.handle(Received(peer(3), Gossip((suspicion(1, 2), suspicion(1, 3)))), 0.0)
    effects = node.handle(Received(peer(3), Gossip((claim(1, START + 1),))), 0.1)
    assert of(effects, Changed) == [Changed(peer(1), State.SUSPECT, State.ALIVE, START + 1, claim(1, START + 1))]
    assert list(node.suspicions()) == []
    [ack] = sent(node.handle(Received(peer(3), Ping(1)), 0.2), Ack)
    assert [item for item in ack.message.gossip if isinstance(item, Suspicion)] == []
    tick_until(node, 200.0)
    assert Changed(peer(1), State.SUSPECT, State.DEAD, START, claim(1)) not in effects


def test_a_newer_record_alone_refutes_nothing() -> None:
    node = core(0, census(6), profile=QUIET)
    node.handle(Received(peer(3), Gossip((suspicion(1, 2),))), 0.0)
    node.handle(Received(peer(3), Gossip((claim(1, START, 9),))), 0.1)
    assert state(node, 1) == State.SUSPECT
    assert node.member(peer(1)).claim == claim(1, START, 9)
