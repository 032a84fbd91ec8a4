"""node.reachable: whether this node can be called, by the words of others."""

from __future__ import annotations

import pytest

from node.reachable import ASK_AGAIN_S, ASKED_S, BELIEVED_S, PEERS_ASKED, PEERS_MAX, RENEWED_S, Reachable
from protos.ids import PeerId

A, B = PeerId("a"), PeerId("b")


@pytest.fixture
def reachable() -> Reachable:
    return Reachable("a.example.org:7645")


def test_as_long_as_nobody_has_tried_nothing_is_wrong(reachable: Reachable) -> None:
    assert reachable.refuted(0.0) is None
    assert reachable.wants(A, 0.0)


def test_who_cannot_reach_this_node_is_believed_until_another_can(reachable: Reachable) -> None:
    reachable.said(A, reached=False, why="nobody listens on port 7645", now=0.0)
    assert reachable.refuted(1.0) == "nobody listens on port 7645"
    reachable.said(B, reached=True, why="", now=2.0)
    assert reachable.refuted(3.0) is None


def test_who_could_not_is_asked_again_and_who_could_much_later(reachable: Reachable) -> None:
    reachable.said(A, reached=False, why="no", now=0.0)
    reachable.said(B, reached=True, why="", now=0.0)
    assert not reachable.wants(A, ASK_AGAIN_S - 1)
    assert reachable.wants(A, ASK_AGAIN_S)
    assert not reachable.wants(B, RENEWED_S - 1)
    assert reachable.wants(B, RENEWED_S)


def test_who_is_being_asked_is_not_asked_again_meanwhile(reachable: Reachable) -> None:
    assert reachable.wants(A, 0.0)
    assert not reachable.wants(A, ASKED_S - 1)
    assert reachable.wants(A, ASKED_S), "it never said anything"
    assert reachable.wants(B, ASKED_S)


def test_an_old_word_is_worth_nothing(reachable: Reachable) -> None:
    reachable.said(A, reached=False, why="no", now=0.0)
    assert reachable.refuted(BELIEVED_S) is None


def test_when_enough_can_reach_it_nobody_more_is_asked(reachable: Reachable) -> None:
    for n in range(PEERS_ASKED):
        assert reachable.wants(PeerId(f"p{n}"), 0.0)
        reachable.said(PeerId(f"p{n}"), reached=True, why="", now=0.0)
    assert not reachable.wants(A, 0.0)


def test_a_good_word_is_renewed_before_it_ends_so_that_one_bad_word_makes_nobody_deaf(reachable: Reachable) -> None:
    reachable.said(A, reached=False, why="no", now=0.0)
    for n in range(PEERS_ASKED):
        reachable.said(PeerId(f"p{n}"), reached=True, why="", now=0.0)
    now = 0.0
    while now < 3 * BELIEVED_S:
        now += 60.0
        assert reachable.refuted(now) is None
        peer = PeerId(f"p{int(now / 60) % PEERS_ASKED}")
        if reachable.wants(peer, now):
            reachable.said(peer, reached=True, why="", now=now)
        if reachable.wants(A, now):
            reachable.said(A, reached=False, why="no", now=now)


def test_no_more_than_the_limit_are_remembered(reachable: Reachable) -> None:
    for n in range(PEERS_MAX + 1):
        reachable.said(PeerId(f"p{n}"), reached=False, why="no", now=0.0)
    assert reachable.wants(PeerId("p0"), 1.0), "the oldest is forgotten"
    assert not reachable.wants(PeerId("p1"), 1.0)


def test_who_could_long_ago_is_not_enough_and_others_are_asked(reachable: Reachable) -> None:
    for n in range(PEERS_ASKED):
        reachable.said(PeerId(f"p{n}"), reached=True, why="", now=0.0)
    assert not reachable.wants(A, RENEWED_S - 1)
    assert reachable.wants(A, RENEWED_S)
