"""PROTOCOL.md section 15: what asks for a push-pull, and how often one begins."""

from __future__ import annotations

from dataclasses import replace

from toy_membership import QUIET, START, answered_until, census, claim, core, of, peer, tick_until

from node.member import State
from node.membership_effect import Changed, Sync
from node.membership_event import Received, Synced
from node.message import Gossip
from node.profile import LAN


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


def test_news_without_room_wants_a_push_pull() -> None:
    node = core(0, census(40), profile=replace(QUIET, broadcasts_max=4))
    first = node.deadline
    node.handle(Received(peer(1), Gossip(tuple(claim(n, START + 1) for n in range(2, 10)))), 0.0)
    assert first is not None
    assert of(tick_until(node, 2 * 2 * LAN.sync_gap_s), Sync)
