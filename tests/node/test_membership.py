"""PROTOCOL.md section 15: who becomes a member, who is refused, and what comes twice."""

from __future__ import annotations

from dataclasses import replace

from toy_membership import QUIET, START, Shoal, census, claim, core, of, peer, state, suspicion, table, tick_until

from node.member import State
from node.membership_effect import Changed, Forgotten, Refusal, Refused, Send, Sync
from node.membership_event import Forget, Received, RecordIssued, Synced
from node.message import Gossip, Ping
from node.profile import LAN


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
