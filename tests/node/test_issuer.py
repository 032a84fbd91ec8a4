"""PROTOCOL.md section 14: when a node signs a new record of itself."""

from __future__ import annotations

from dataclasses import replace

from node.issuer import RECORD_GAP_S, RECORD_S, Issuer
from node.record import Held, Record

NOW = 1_800_000_000.0
OWN = Record(b"k" * 32, ("h:1",), None, 0, 0, 0)
HELD = (Held("ab" * 32, True),)


def issued(issuer: Issuer, now: float) -> Record:
    made = issuer.issue(now)
    assert made is not None
    return made


def test_the_first_record_is_issued_at_once_and_numbered_by_the_clock() -> None:
    issuer = Issuer(OWN)
    assert issuer.deadline <= NOW
    made = issued(issuer, NOW)
    assert (made.sequence, made.issued_at_ms) == (1_800_000_000_000, 1_800_000_000_000)
    assert made.expires_at_ms - made.issued_at_ms == RECORD_S * 1000 >= 3_600_000


def test_without_a_change_a_record_is_issued_when_half_of_its_time_is_over() -> None:
    issuer = Issuer(OWN)
    first = issued(issuer, NOW)
    issuer.say(replace(OWN, sequence=77, issued_at_ms=5))
    assert issuer.deadline == NOW + RECORD_S / 2
    assert issuer.issue(NOW + RECORD_S / 2 - 1) is None
    assert issued(issuer, NOW + RECORD_S / 2).sequence > first.sequence


def test_changes_go_together_and_never_twice_within_ten_seconds() -> None:
    issuer = Issuer(OWN)
    first = issued(issuer, NOW)
    issuer.say(replace(OWN, zone="a"))
    issuer.say(replace(OWN, zone="b", held=HELD))
    assert issuer.deadline == NOW + RECORD_GAP_S
    assert issuer.issue(NOW + RECORD_GAP_S - 0.1) is None
    second = issued(issuer, NOW + RECORD_GAP_S)
    assert (second.zone, second.held) == ("b", HELD)
    assert second.sequence > first.sequence
    assert issuer.issue(NOW + 2 * RECORD_GAP_S) is None


def test_a_change_after_a_long_rest_is_issued_at_once() -> None:
    issuer = Issuer(OWN)
    issued(issuer, NOW)
    issuer.say(replace(OWN, zone="a"))
    assert issuer.deadline < NOW + 100
    assert issued(issuer, NOW + 100).zone == "a"


def test_a_node_goes_on_above_what_others_know_of_it() -> None:
    issuer = Issuer(OWN)
    first = issued(issuer, NOW)
    issuer.outrank(first.sequence - 1)
    assert issuer.issue(NOW + RECORD_GAP_S) is None
    issuer.outrank(first.sequence + 10**9)
    assert issued(issuer, NOW + RECORD_GAP_S).sequence == first.sequence + 10**9 + 1
    assert Issuer(replace(OWN, sequence=1 << 62)).issue(NOW).sequence == (1 << 62) + 1


def test_a_clock_that_went_back_means_a_new_record_with_a_higher_sequence() -> None:
    issuer = Issuer(OWN)
    first = issued(issuer, NOW)
    second = issued(issuer, NOW - 3600)
    assert second.sequence == first.sequence + 1
    assert second.issued_at_ms == first.issued_at_ms - 3_600_000
    assert issuer.issue(NOW - 3600 + RECORD_GAP_S) is None


def test_no_record_outlives_its_grant() -> None:
    ends_at_ms = int((NOW + 100) * 1000)
    issuer = Issuer(OWN, ends_at_ms=ends_at_ms)
    assert issued(issuer, NOW).expires_at_ms == ends_at_ms
    assert issuer.deadline == NOW + 50
    assert issued(issuer, NOW + 99).expires_at_ms == ends_at_ms
    assert issuer.deadline == NOW + 99 + RECORD_GAP_S
    late = issued(issuer, NOW + 200)
    assert late.expires_at_ms == late.issued_at_ms + 1
