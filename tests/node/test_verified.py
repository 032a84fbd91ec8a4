"""PROTOCOL.md section 15: what costs a verification, and what a forgery costs its teller."""

from __future__ import annotations

from dataclasses import replace

from toy_membership import QUIET, START, census, claim, core, peer, suspicion, verify

from node.membership_effect import Refusal, Refused
from node.membership_event import Received, Synced
from node.message import Gossip
from protos.errors import InvalidSignature


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
