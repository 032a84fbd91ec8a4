"""PROTOCOL.md section 15: scenes between a few nodes, and what one node does with what it is told."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from toy_membership import (
    NETWORK,
    START,
    Shoal,
    census,
    claim,
    core,
    key,
    of,
    peer,
    sent,
    signer,
    suspicion,
    verify,
)

from node.claim import Claim, Suspicion, sign_claim
from node.member import State
from node.membership_effect import Answered, Changed, Forgotten, Refusal, Refused, Send, Sync
from node.membership_event import Deaf, Doubt, Forget, Greet, Leave, Received, RecordIssued, Synced, Tick
from node.message import Ack, Gossip, Nack, Ping, PingRequest
from node.profile import LAN, MEMBERLIST_LAN, MEMBERLIST_WAN, PLAIN_SWIM, WAN
from protos.errors import InvalidSignature
from protos.limits import INCARNATION_MAX

if TYPE_CHECKING:
    from node.membership import Membership

QUIET = replace(LAN, gossip_fanout=0, dead_probe_period_s=0.0, pause_s=0.0)


def probe(node: Membership) -> tuple[float, Send]:
    """Ticks until the node pings: when, and what."""
    while True:
        now = node.deadline
        assert now is not None
        pings = sent(node.handle(Tick(), now), Ping)
        if pings:
            return now, pings[0]


def tick_until(node: Membership, until: float) -> list[object]:
    effects: list[object] = []
    while node.deadline is not None and node.deadline <= until:
        effects += node.handle(Tick(), node.deadline)
    return effects


def answered_until(node: Membership, until: float) -> list[object]:
    """Ticks, while all that is pinged answers at once."""
    effects: list[object] = []
    while node.deadline is not None and node.deadline <= until:
        now = node.deadline
        done = node.handle(Tick(), now)
        for ping in sent(done, Ping):
            done += node.handle(Received(ping.to, Ack(ping.message.nonce)), now)
        effects += done
    return effects


def state(node: Membership, number: int) -> State | None:
    member = node.member(peer(number))
    return None if member is None else member.state


def table(node: Membership) -> tuple[object, ...]:
    return (node.claim, sorted(map(str, node.members())), sorted(map(str, node.suspicions())), node.health)


# --- scenes of several nodes ---------------------------------------------------------------------------------------


def test_nodes_that_answer_are_never_suspected() -> None:
    shoal = Shoal(5)
    shoal.run(60)
    assert not of((effect for _, _, effect in shoal.effects), Changed)
    assert {node.health for node in shoal.nodes.values()} == {0}


def test_a_node_that_no_answer_reaches_accuses_nobody_and_goes_by_what_others_say() -> None:
    shoal = Shoal(5)
    shoal.cut = lambda _from, to: to == peer(3)
    shoal._meet = lambda one, other: one == peer(3) or peer(3) not in (one, other)
    shoal.run(3)
    assert State.SUSPECT in [shoal.state(n, at=3) for n in (0, 1, 2, 4)]
    shoal.tell(3, Deaf(True))
    shoal.tell(3, Deaf(True))
    assert [shoal.state(n, at=3) for n in (0, 1, 2, 4)] == [State.ALIVE] * 4
    shoal.tell(3, Doubt(peer(1)))
    shoal.effects.clear()
    shoal.run(120)
    changes = of((effect for _, who, effect in shoal.effects if who == peer(3)), Changed)
    assert State.DEAD not in {change.after for change in changes}
    assert [shoal.state(n, at=3) for n in (0, 1, 2, 4)] == [State.ALIVE] * 4
    assert [shoal.state(3, at=n) for n in (0, 1, 2, 4)] == [State.DEAD] * 4
    assert {n: shoal.state(n, at=0) for n in (1, 2, 4)} == dict.fromkeys((1, 2, 4), State.ALIVE)
    shoal.stop(4)
    shoal.run(240)
    assert shoal.state(4, at=3) is State.DEAD
    del shoal._meet
    shoal.cut = lambda _from, _to: False
    shoal.tell(3, Deaf(False))
    shoal.run(5)
    assert [shoal.state(3, at=n) for n in (0, 1, 2)] == [State.ALIVE] * 3


@pytest.mark.parametrize("profile", [LAN, PLAIN_SWIM, MEMBERLIST_LAN], ids=["LAN", "plain", "memberlist"])
def test_a_node_that_crashed_is_dead_for_all_after_their_own_timers(profile) -> None:
    shoal = Shoal(5, profile=profile)
    shoal.stop(4)
    shoal.run(30)
    assert [shoal.state(4, at) for at in range(4)] == [State.DEAD] * 4
    assert [len(shoal[at]) for at in range(4)] == [4] * 4


@pytest.mark.parametrize("profile", [WAN, MEMBERLIST_WAN], ids=["WAN", "memberlist"])
def test_over_a_wan_the_same_takes_longer(profile) -> None:
    shoal = Shoal(5, profile=profile)
    shoal.stop(4)
    shoal.run(20)
    assert State.DEAD not in [shoal.state(4, at) for at in range(4)]
    shoal.run(100)
    assert [shoal.state(4, at) for at in range(4)] == [State.DEAD] * 4


def test_a_node_that_only_some_cannot_reach_stays_alive_through_helpers() -> None:
    shoal = Shoal(5)
    shoal.cut = lambda a, b: {a, b} == {peer(0), peer(1)}
    shoal.run(60)
    assert not of((effect for _, _, effect in shoal.effects), Changed)


def test_a_leave_is_told_apart_from_a_death() -> None:
    shoal = Shoal(5)
    shoal.run(2)
    shoal.tell(4, Leave())
    shoal.run(3)
    assert shoal[4].deadline is None
    shoal.stop(4)
    shoal.run(60)
    assert [shoal.state(4, at) for at in range(4)] == [State.LEFT] * 4
    assert State.SUSPECT not in [e.after for _, _, e in shoal.effects if isinstance(e, Changed)]


def test_a_healed_partition_is_found_and_everybody_lives_again() -> None:
    shoal = Shoal(6)
    shoal.cut = lambda a, b: (a in {peer(0), peer(1)}) != (b in {peer(0), peer(1)})
    shoal.run(60)
    assert shoal.state(0, at=3) == State.DEAD
    assert shoal.state(3, at=0) == State.DEAD  # the few are ill, and gave others half as much time again, no more
    assert shoal.state(4, at=3) == State.ALIVE
    shoal.cut = lambda _a, _b: False
    shoal.run(30)
    assert {shoal.state(a, b) for a in range(6) for b in range(6) if a != b} == {State.ALIVE}


def test_a_newcomer_that_one_node_knows_is_known_to_all_after_push_pulls() -> None:
    shoal = Shoal(4)
    shoal.nodes[peer(9)] = core(9, now=0.0)
    shoal.tell(9, shoal.push(peer(0)))
    shoal.tell(0, shoal.push(peer(9)))
    shoal.run(15)
    assert [shoal.state(9, at) for at in range(4)] == [State.ALIVE] * 4
    assert len(shoal[9]) == 5


def test_a_node_that_restarts_outranks_its_past_and_its_death() -> None:
    shoal = Shoal(4)
    shoal.stop(3)
    shoal.run(30)
    shoal.stopped.clear()
    shoal.nodes[peer(3)] = core(3, census(4), incarnation=START + 30_000, now=shoal.now)
    shoal.run(10)
    assert [shoal.state(3, at) for at in range(3)] == [State.ALIVE] * 3


def test_a_node_whose_clock_went_back_before_it_restarted_goes_above_its_past() -> None:
    shoal = Shoal(4)
    shoal.stop(3)
    shoal.run(30)
    shoal.stopped.clear()
    shoal.nodes[peer(3)] = core(3, census(4), incarnation=START - 5000, now=shoal.now)
    shoal.run(15)
    assert [shoal.state(3, at) for at in range(3)] == [State.ALIVE] * 3
    assert shoal[3].claim.incarnation > START


def test_a_node_that_left_and_came_back_with_an_older_clock_goes_above_its_farewell() -> None:
    shoal = Shoal(4)
    shoal.tell(3, Leave())
    shoal.run(5)
    shoal.nodes[peer(3)] = core(3, census(4), incarnation=START - 5000, now=shoal.now)
    shoal.run(10)
    assert [shoal.state(3, at) for at in range(3)] == [State.ALIVE] * 3


def test_equal_events_and_randomness_give_equal_effects() -> None:
    first, second = Shoal(5, seed=7), Shoal(5, seed=7)
    for shoal in (first, second):
        shoal.stop(2)
        shoal.run(20)
    assert first.effects == second.effects
    assert first.effects != Shoal(5, seed=8).effects


# --- probes --------------------------------------------------------------------------------------------------------


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


# --- suspicions ----------------------------------------------------------------------------------------------------


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


def test_a_ping_to_a_suspect_carries_the_suspicion_first_and_without_buddies_it_does_not() -> None:
    for buddy in (True, False):
        node = core(0, census(2), profile=replace(QUIET, buddy=buddy))
        node.handle(Synced(peer(1), (claim(2),)), 0.0)
        node.handle(Received(peer(2), Gossip((suspicion(1, 2),))), 0.0)
        [ack] = sent(node.handle(Received(peer(1), Ping(1)), 0.1), Ack)
        urgent = (claim(1), suspicion(1, 2))
        assert (claim(1) in ack.message.gossip) == buddy
        assert not buddy or set(urgent) <= set(ack.message.gossip)


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


# --- refutation ----------------------------------------------------------------------------------------------------


def test_a_forged_death_of_a_healthy_node_leads_to_a_refutation_and_nothing_else() -> None:
    shoal = Shoal(5)
    lie = Gossip((suspicion(1, 4),))
    for at in (0, 1, 2, 3):
        shoal.tell(at, Received(peer(4), lie))
    shoal.run(10)
    changes = [e for _, _, e in shoal.effects if isinstance(e, Changed)]
    assert {e.after for e in changes} <= {State.SUSPECT, State.ALIVE}
    assert {shoal.state(1, at) for at in (0, 2, 3, 4)} == {State.ALIVE}
    assert shoal[1].claim.incarnation == START + 1


def test_an_accused_node_raises_its_incarnation_answers_and_counts_it_against_its_health() -> None:
    node = core(1, census(4), profile=QUIET)
    [ack] = sent(node.handle(Received(peer(2), Ping(5, (suspicion(1, 2),))), 0.0), Ack)
    assert ack.message.gossip[0] == claim(1, START + 1)
    assert node.health == 1
    [reply] = sent(node.handle(Received(peer(2), Gossip((suspicion(1, 3, START + 1),))), 0.1), Gossip)
    assert reply.message.gossip[0] == claim(1, START + 2)
    assert node.health == 1  # once in a period: nobody can talk a node ill


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


def test_an_accuser_that_is_refuted_again_and_again_is_not_heard_about_that_member_any_more() -> None:
    node = core(1, census(5), profile=QUIET)

    def accuse(subject: int, accuser: int, now: float) -> State:
        held = node.member(peer(subject)).claim
        node.handle(Received(peer(accuser), Gossip((suspicion(subject, accuser, held.incarnation),))), now)
        state = node.member(peer(subject)).state
        refuted = claim(subject, held.incarnation + 1)
        node.handle(Received(peer(subject), Gossip((refuted,))), now)
        return state

    assert [accuse(3, 2, 0.1 * n) for n in range(6)] == [State.SUSPECT] * 4 + [State.ALIVE] * 2
    assert accuse(4, 2, 1.0) is State.SUSPECT, "about another it is heard"
    assert accuse(3, 4, 1.0) is State.SUSPECT, "and another is heard about that one"
    assert accuse(3, 2, 1.0 + QUIET.accuser_gap_s) is State.SUSPECT


def test_a_stale_accusation_is_answered_with_the_claim_in_force() -> None:
    node = core(1, census(4), profile=QUIET, incarnation=START + 7)
    [reply] = sent(node.handle(Received(peer(2), Gossip((suspicion(1, 3),))), 0.0), Gossip)
    assert node.claim in reply.message.gossip
    assert node.claim == claim(1, START + 7)


def test_an_accusation_of_an_incarnation_that_never_was_raises_nothing() -> None:
    node = core(1, census(4), profile=QUIET)
    assert node.handle(Received(peer(2), Gossip((suspicion(1, 2, INCARNATION_MAX),))), 0.0) == []
    assert node.claim == claim(1)


def test_a_forged_accusation_is_not_refuted() -> None:
    node = core(1, census(4), profile=QUIET)
    effects = node.handle(Received(peer(2), Gossip((replace(suspicion(1, 2), signature=bytes(64)),))), 0.0)
    assert effects == [Refused(peer(2), Refusal.FORGED)]
    assert node.claim == claim(1)


def test_an_accuser_who_is_thought_dead_is_refuted_too_but_says_nothing_about_health() -> None:
    node = core(1, census(4), profile=QUIET)
    node.handle(Received(peer(2), Gossip((suspicion(1, 77),))), 0.0)
    assert node.claim.incarnation == START + 1
    assert node.health == 0


def test_a_higher_claim_of_its_own_is_gone_above_and_a_forged_one_is_not() -> None:
    node = core(1, census(4), profile=QUIET)
    node.handle(Received(peer(2), Gossip((replace(claim(1, START + 9), signature=bytes(64)),))), 0.0)
    assert node.claim.incarnation == START
    node.handle(Synced(peer(2), (claim(1, START + 9),)), 0.0)
    assert node.claim.incarnation == START + 10
    node.handle(Synced(peer(2), (claim(1, INCARNATION_MAX),)), 0.0)
    assert node.claim.incarnation == INCARNATION_MAX


def test_a_push_pull_that_accuses_this_node_is_answered_at_once() -> None:
    node = core(1, census(4), profile=QUIET)
    [reply] = sent(node.handle(Synced(peer(2), (), (suspicion(1, 2),)), 0.0), Gossip)
    assert (reply.to, reply.message.gossip[0]) == (peer(2), claim(1, START + 1))


def test_nobody_raises_anothers_incarnation() -> None:
    node = core(0, census(4), profile=QUIET)
    raised = sign_claim(signer(key(2)), NETWORK, key(1), START + 50, 1)  # signed by 2
    assert node.handle(Received(peer(2), Gossip((raised,))), 0.0) == [Refused(peer(2), Refusal.FORGED)]
    assert node.member(peer(1)).claim == claim(1)


# --- the dead and the left -----------------------------------------------------------------------------------------


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


def test_a_probe_of_one_who_left_meanwhile_fails_without_a_word() -> None:
    node = core(0, census(3), profile=QUIET)
    now, ping = probe(node)
    number = 1 if ping.to == peer(1) else 2
    node.handle(Received(ping.to, Gossip((claim(number, START + 1, left=True),))), now)
    tick_until(node, now + 1.5)
    assert state(node, number) == State.LEFT
    assert node.health == 0


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


# --- push-pull -----------------------------------------------------------------------------------------------------


def test_gossip_about_a_stranger_asks_for_a_push_pull_and_makes_no_member() -> None:
    node = core(0, census(3), profile=QUIET)
    assert node.handle(Received(peer(1), Gossip((claim(9),))), 0.0) == [Sync(peer(1))]
    assert node.member(peer(9)) is None
    effects = node.handle(Synced(peer(1), (claim(9),)), 0.1)
    assert effects == [Changed(peer(9), None, State.ALIVE, START, claim(9))]


def test_a_newer_record_asks_for_a_push_pull_with_the_teller() -> None:
    node = core(0, census(3), profile=QUIET)
    effects = node.handle(Received(peer(2), Gossip((claim(1, START, 2),))), 0.0)
    assert effects == [Changed(peer(1), State.ALIVE, State.ALIVE, START, claim(1, START, 2)), Sync(peer(2))]


def test_who_issues_records_without_end_has_them_fetched_as_often_as_one_may_be_issued() -> None:
    node = core(0, census(5), profile=QUIET)

    def fetched(teller: int, subject: int, sequence: int, now: float) -> bool:
        wished = node.handle(Received(peer(teller), Gossip((claim(subject, sequence=sequence),))), now)
        node.handle(Synced(peer(teller)), now)
        return Sync(peer(teller)) in wished

    often = [fetched(1, 2, 2 + n, 3.0 * n) for n in range(30)]
    assert often[:2] == [True, True], "one may have been late, the next early"
    assert 8 <= sum(often) <= 11, "90 s"
    assert node.member(peer(2)).claim.sequence == 31, "what it claims is taken all the same"
    assert fetched(1, 3, 2, 90.0), "and another's record is fetched"


def test_push_pulls_that_are_asked_for_keep_a_gap() -> None:
    node = core(0, census(3), profile=QUIET)
    assert Sync(peer(2)) in node.handle(Received(peer(2), Gossip((claim(1, START, 2),))), 0.0)
    assert not of(node.handle(Received(peer(2), Gossip((claim(1, START, 3),))), 0.1), Sync)
    assert not of(node.handle(Received(peer(1), Gossip((claim(1, START, 4),))), 0.2), Sync)
    assert of(tick_until(node, LAN.sync_gap_s), Sync) == [Sync(peer(2))]


def test_a_push_pull_with_whom_it_was_wanted_ends_the_wish() -> None:
    node = core(0, census(3), profile=QUIET)
    node.handle(Received(peer(2), Gossip((claim(1, START, 2),))), 0.0)
    node.handle(Received(peer(2), Gossip((claim(1, START, 3),))), 0.1)
    node.handle(Synced(peer(2)), 0.2)
    assert not of(tick_until(node, 1.0), Sync)


def test_push_pulls_come_at_random_and_rarer_with_more_members() -> None:
    few, many = core(0, census(20), profile=QUIET), core(0, census(200), profile=QUIET)
    syncs = [len(of(answered_until(node, 3000.0), Sync)) for node in (few, many)]
    assert 80 <= syncs[0] <= 125
    assert 20 <= syncs[1] <= 32  # ceil(log2 200 - 5) + 1 = 4 times rarer


def test_the_first_push_pull_after_joining_comes_soon() -> None:
    node = core(0, profile=QUIET)
    node.handle(Synced(peer(1), (claim(1), claim(2))), 0.0)
    assert len(of(tick_until(node, LAN.sync_first_s), Sync)) == 1


def test_a_push_pull_that_brings_many_passes_few_on() -> None:
    node = core(0, profile=replace(QUIET, synced_broadcasts_max=5))
    node.handle(Synced(peer(1), tuple(claim(n) for n in range(1, 101))), 0.0)
    node.handle(Synced(peer(1), tuple(claim(n, START + 1) for n in range(50, 101))), 0.0)
    told = set()
    for nonce in range(100):
        [ack] = sent(node.handle(Received(peer(1), Ping(nonce)), 0.0), Ack)
        told |= {item.peer for item in ack.message.gossip}
    assert len(told) == 11  # five of each push-pull, and this node


def test_news_without_room_wants_a_push_pull() -> None:
    node = core(0, census(40), profile=replace(QUIET, broadcasts_max=4))
    first = node.deadline
    node.handle(Received(peer(1), Gossip(tuple(claim(n, START + 1) for n in range(2, 10)))), 0.0)
    assert first is not None
    assert of(tick_until(node, 2 * 2 * LAN.sync_gap_s), Sync)


def test_a_strangers_message_gets_no_answer_but_a_wish_to_know_it() -> None:
    node = core(0, census(3), profile=QUIET)
    effects = node.handle(Received(peer(99), Ping(1, (suspicion(1, 2),))), 0.0)
    assert effects == [Refused(peer(99), Refusal.STRANGER), Sync(peer(99))]
    assert state(node, 1) == State.ALIVE


def test_a_flood_of_invented_identities_changes_nothing_and_does_not_displace_members_wishes() -> None:
    node = core(0, census(3), profile=QUIET)
    before = table(node)
    effects = [e for n in range(1000) for e in node.handle(Received(peer(100 + n), Ping(n)), 0.0)]
    assert len(of(effects, Sync)) == 1
    assert table(node) == before
    node.handle(Received(peer(2), Gossip((claim(1, START, 2),))), 0.5)
    assert of(tick_until(node, LAN.sync_gap_s), Sync) == [Sync(peer(2))]


def test_its_own_datagrams_that_somebody_mirrors_are_ignored() -> None:
    node = core(0, census(3), profile=QUIET)
    assert node.handle(Received(peer(0), Ping(1)), 0.0) == []


def test_a_full_table_refuses_strangers_by_name_and_keeps_who_is_known() -> None:
    node = core(0, census(4), profile=replace(QUIET, members_max=3))
    effects = node.handle(Synced(peer(1), tuple(claim(n) for n in range(10, 20))), 0.0)
    assert effects == [Refused(peer(10), Refusal.FULL)]
    assert node.handle(Received(peer(1), Gossip((claim(10),))), 0.0) == [Refused(peer(10), Refusal.FULL)]
    assert len(node) == 4


def test_a_stranger_takes_the_place_of_the_oldest_tombstone() -> None:
    node = core(0, census(4), profile=replace(QUIET, members_max=3))
    node.handle(Received(peer(1), Gossip((claim(1, START + 1, left=True),))), 0.0)
    effects = node.handle(Synced(peer(2), (claim(10),)), 0.0)
    assert effects == [Forgotten(peer(1)), Changed(peer(10), None, State.ALIVE, START, claim(10))]


def test_a_claim_of_a_stranger_that_left_or_is_forged_makes_no_member() -> None:
    node = core(0, census(4), profile=QUIET)
    forged = replace(claim(9), signature=bytes(64))
    assert node.handle(Synced(peer(1), (claim(8, left=True), forged)), 0.0) == [Refused(peer(1), Refusal.FORGED)]
    assert len(node) == 4


def test_a_forgotten_member_is_a_stranger_and_can_come_back() -> None:
    node = core(0, census(4), profile=QUIET)
    assert node.handle(Forget(peer(1)), 0.0) == [Forgotten(peer(1))]
    assert node.handle(Forget(peer(1)), 0.0) == []
    node.handle(Synced(peer(2), (claim(1),)), 0.0)
    assert state(node, 1) == State.ALIVE


def test_a_member_that_is_forgotten_during_its_probe_is_suspected_by_nobody() -> None:
    node = core(0, census(3), profile=QUIET)
    now, ping = probe(node)
    node.handle(Forget(ping.to), now)
    tick_until(node, now + 3)
    assert ping.to not in {suspicion.subject for suspicion in node.suspicions()}


# --- what comes twice, and limits ----------------------------------------------------------------------------------


def test_a_replayed_datagram_changes_nothing() -> None:
    """Each message that five nodes ever sent each other, once more at the end."""
    shoal = Shoal(5)
    shoal.stop(4)
    shoal.run(8)
    shoal.tell(0, Received(peer(1), Gossip((suspicion(2, 1),))))
    shoal.tell(0, RecordIssued(5))
    shoal.run(30)
    replays = [(who, e.to, e.message) for at, who, e in shoal.effects if isinstance(e, Send) and at < 37]
    before = {p: table(node) for p, node in shoal.nodes.items()}
    for sender, to, message in replays:
        if to == peer(4):
            continue
        effects = shoal.nodes[to].handle(Received(sender, message), shoal.now)
        assert not of(effects, Changed)
    assert {p: table(node) for p, node in shoal.nodes.items()} == before


def test_identical_items_are_verified_once() -> None:
    calls = []
    node = core(0, census(3), profile=replace(QUIET, verified_max=2), verify=lambda *a: calls.append(a))
    for _ in range(5):
        node.handle(Received(peer(1), Gossip((claim(8), claim(9)))), 0.0)
    assert len(calls) == 2
    for number in (8, 9, 10):
        node.handle(Received(peer(1), Gossip((claim(number),))), 0.0)
    assert len(calls) == 3
    node.handle(Received(peer(1), Gossip((claim(8),))), 0.0)  # forgotten for 10, so verified again
    assert len(calls) == 4


def test_a_claim_that_is_not_newer_costs_no_verification() -> None:
    def refuse(*_: object) -> None:
        raise InvalidSignature("nobody asked")

    node = core(0, census(3), profile=QUIET, verify=refuse)
    assert node.handle(Received(peer(1), Gossip((claim(1), claim(2, START - 1)))), 0.0) == []


def test_who_passes_one_forgery_on_is_not_listened_to_further_in_that_event() -> None:
    """Eight thousand forgeries in a push-pull would be seconds of verifying, in which nobody else is heard."""
    calls = []

    def counted(public_key: bytes, signature: bytes, domain: bytes, message: bytes) -> None:
        calls.append(signature)
        verify(public_key, signature, domain, message)

    forged = tuple(replace(claim(n % 18 + 2, START + n), signature=bytes(64)) for n in range(1, 8193))
    accused = tuple(replace(suspicion(n, 1), signature=bytes(64)) for n in range(2, 20))
    for event in (
        Synced(peer(1), forged, accused),
        Synced(peer(1), (), accused),
        Received(peer(1), Gossip(forged[:8])),
        Received(peer(1), Gossip((*accused[:4], *forged[:4]))),
    ):
        node = core(0, census(20), profile=QUIET, verify=counted)
        calls.clear()
        assert node.handle(event, 0.0) == [Refused(peer(1), Refusal.FORGED)]
        assert len(calls) == 1
        assert all(member.claim.incarnation == START for member in node.members())
        node.handle(Synced(peer(1), (claim(2, START + 9000),)), 0.1)
        assert node.member(peer(2)).claim.incarnation == START + 9000, "the next event is another one"


def test_what_came_before_a_forgery_counts() -> None:
    node = core(0, census(4), profile=QUIET)
    items = (claim(2, START + 1), replace(claim(1, START + 1), signature=bytes(64)), claim(3, START + 1))
    node.handle(Synced(peer(1), items), 0.0)
    assert [node.member(peer(n)).claim.incarnation - START for n in (1, 2, 3)] == [0, 1, 0]


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


# --- pauses --------------------------------------------------------------------------------------------------------


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


# --- gossip --------------------------------------------------------------------------------------------------------


def test_news_is_sent_to_a_few_until_it_has_been_told_often_enough() -> None:
    node = core(0, census(9), profile=replace(LAN, probe_period_s=1000.0, probe_timeout_s=500.0, sync_period_s=9000.0))
    node.handle(Received(peer(1), Gossip((claim(2, START + 1),))), 0.0)
    told = sent(tick_until(node, 20.0), Gossip)
    assert len(told) == LAN.retransmit_multiplier  # ceil(log10(9 + 1)) = 1
    assert all(send.message.gossip == (claim(2, START + 1),) for send in told)
