"""PROTOCOL.md section 14: the newest valid record of every peer, whatever others send."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from random import Random
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from node import grant as grants
from node import network as networks
from node import revocations as lists
from node.grant import Grant
from node.identity import Identity
from node.network import Network, open_network
from node.newcomers import WINDOW_S
from node.record import Held, Record, opened, sign
from node.revocations import Revocations
from node.routing_table import Accepted, RoutingTable, Same, Stale
from protos import peers_pb2 as pb
from protos.errors import (
    Equivocation,
    GrantMissing,
    GrantRevoked,
    InvalidManifest,
    InvalidRecord,
    InvalidSignature,
    Overloaded,
    RecordExpired,
    RecordFromFuture,
    RecordRolledBack,
    WrongNetwork,
)
from protos.limits import (
    EVIDENCE_MAX,
    MARKS_MAX,
    NEWCOMER_S_MAX,
    NEWCOMER_SENDERS_MAX,
    NEWCOMERS_MAX,
    NEWCOMERS_OF_SENDER_MAX,
    REACHED_OF_SITE_MAX,
    RECORDS_MAX,
)

if TYPE_CHECKING:
    from protos.ids import PeerId

NOW = 1_800_000_000.0
ME, OTHER = Identity.create(), Identity.create()
MODEL = "ab" * 32


def record(
    identity: Identity = ME,
    sequence: int = 5,
    zone: str = "",
    now: float = NOW,
    life_s: int = 600,
    held: tuple[Held, ...] = (),
    at: str = "h:1",
    network: Network | None = None,
    grant: bytes = b"",
) -> bytes:
    now_ms = int(now * 1000)
    made = Record(
        identity.public_key, (at,), None, sequence, now_ms, now_ms + life_s * 1000, zone=zone, held=held, grant=grant
    )
    return sign(replace(made, network=(network or open_network()).id), identity)


def crowd(count: int, seed: int = 0) -> list[Identity]:
    """Cheap to make, and the same each time."""
    seeds = (hashlib.sha256(f"{seed}.{n}".encode()).digest() for n in range(count))
    return [Identity(Ed25519PrivateKey.from_private_bytes(one)) for one in seeds]


def test_a_newer_record_takes_the_place_of_an_older_one() -> None:
    table = RoutingTable()
    assert isinstance(table.merge(record(), NOW), Accepted)
    outcome = table.merge(record(sequence=6, zone="new"), NOW)
    assert isinstance(outcome, Accepted)
    assert table.get(ME.peer) == outcome.record
    assert outcome.record.zone == "new"
    assert table.signed() == {ME.peer: record(sequence=6, zone="new")}
    assert table.signed_of(ME.peer) == record(sequence=6, zone="new")
    assert table.signed_of(OTHER.peer) is None
    assert list(table.records()) == [ME.peer]


def test_the_same_record_again_is_no_news_and_costs_no_signature() -> None:
    table = RoutingTable()
    table.merge(record(), NOW)
    forged = pb.SignedRecord(record=opened(record()).content, signature=b"x" * 64).SerializeToString()
    assert isinstance(table.merge(forged, NOW), Same)
    assert table.signed_of(ME.peer) == record()


def test_what_others_put_around_a_record_is_not_passed_on() -> None:
    table = RoutingTable()
    table.merge(record() + b"\xfa\x7f\x01!", NOW)
    assert table.signed_of(ME.peer) == record()


def test_a_record_that_comes_late_is_stale() -> None:
    table = RoutingTable()
    table.merge(record(sequence=6), NOW)
    assert isinstance(table.merge(record(sequence=5, zone="old"), NOW), Stale)
    assert table.get(ME.peer).sequence == 6


def test_of_two_with_one_sequence_the_first_stays_and_both_are_evidence() -> None:
    table = RoutingTable()
    table.merge(record(zone="one"), NOW)
    for _ in range(2):
        with pytest.raises(Equivocation, match="one sequence"):
            table.merge(record(zone="two"), NOW)
    assert table.get(ME.peer).zone == "one"
    (evidence,) = table.evidence()
    assert (evidence.peer, evidence.sequence) == (ME.peer, 5)
    assert (evidence.first, evidence.second) == (record(zone="one"), record(zone="two"))


def test_evidence_is_bounded_and_that_of_invented_identities_gives_way() -> None:
    table = RoutingTable()
    inventions = crowd(EVIDENCE_MAX)
    for one in inventions:
        table.merge(record(one), NOW, "a liar")
        with pytest.raises(Equivocation):
            table.merge(record(one, zone="two"), NOW, "a liar")
    for reached in (False, True):
        one = Identity.create()
        table.merge(record(one), NOW, "a liar")
        if reached:
            table.reached(one.peer, NOW)
        with pytest.raises(Equivocation):
            table.merge(record(one, zone="two"), NOW, "a liar")
        assert len(table.evidence()) == EVIDENCE_MAX
        assert (one.peer in {piece.peer for piece in table.evidence()}) == reached


def test_what_is_refused_changes_nothing() -> None:
    table = RoutingTable()
    table.merge(record(), NOW)
    stolen = sign(replace(table.get(ME.peer), sequence=9), OTHER)
    for wrong, error in (
        (stolen, InvalidSignature),
        (record(sequence=9, now=NOW - 600), RecordExpired),
        (record(sequence=9, now=NOW - 3600), RecordExpired),
        (record(sequence=9, now=NOW + 301), RecordFromFuture),
        (record(sequence=9, network=open_network("other")), WrongNetwork),
        (b"", InvalidRecord),
    ):
        with pytest.raises(error):
            table.merge(wrong, NOW)
    assert table.signed() == {ME.peer: record()}
    assert table.evidence() == ()


def test_nobody_can_take_a_peer_offline_in_its_name() -> None:
    """A record that says "I hold nothing", far into the future, by somebody else; and the peer's own, replayed."""
    table = RoutingTable()
    held = (Held(MODEL, True),)
    early = record(sequence=4, life_s=86_400)
    table.merge(record(sequence=5, held=held, life_s=3600), NOW)
    gone = replace(table.get(ME.peer), held=(), sequence=1 << 62, expires_at_ms=int(NOW * 1000) + 86_400_000)
    with pytest.raises(InvalidSignature):
        table.merge(sign(gone, OTHER), NOW)
    assert isinstance(table.merge(early, NOW), Stale)
    assert table.get(ME.peer).held == held
    table.expire(NOW + 3600)
    with pytest.raises(RecordRolledBack):
        table.merge(early, NOW + 3600)
    assert table.get(ME.peer) is None


def test_an_expired_record_is_forgotten_and_not_taken_again() -> None:
    table = RoutingTable()
    table.merge(record(), NOW)
    table.merge(record(OTHER, now=NOW + 10), NOW + 10)
    assert table.expire(NOW + 599.9) == []
    with pytest.raises(RecordExpired):
        table.merge(record(), NOW + 600)
    assert table.expire(NOW + 600) == [ME.peer]
    assert list(table.records()) == [OTHER.peer]
    with pytest.raises(RecordExpired):
        table.merge(record(), NOW + 600)


# --- marks ----------------------------------------------------------------------------------------------------------


def test_a_sequence_does_not_go_back_over_a_restart() -> None:
    before = RoutingTable()
    before.merge(record(sequence=6), NOW)
    after = RoutingTable(marks=before.marks())
    with pytest.raises(RecordRolledBack):
        after.merge(record(sequence=5), NOW)
    with pytest.raises(Equivocation):
        after.merge(record(sequence=6, zone="another"), NOW)
    assert isinstance(after.merge(record(sequence=6), NOW), Accepted)
    assert isinstance(after.merge(record(sequence=7), NOW), Accepted)
    assert after.marks()[ME.peer].sequence == 7


def test_a_mark_lasts_until_every_older_record_has_expired() -> None:
    table = RoutingTable()
    table.merge(record(sequence=6), NOW)
    table.expire(NOW + 600)
    assert table.marks()[ME.peer].sequence == 6
    table.expire(NOW + 86_400 + 299)
    assert ME.peer in table.marks()
    table.expire(NOW + 86_400 + 301)
    assert table.marks() == {}


def test_marks_are_bounded_and_those_of_known_peers_stay() -> None:
    table = RoutingTable()
    table.merge(record(), NOW)
    (mark,) = table.marks().values()
    many = {f"{n}": replace(mark, ends_at_ms=mark.ends_at_ms + 1 + n) for n in range(MARKS_MAX + 10)}
    crowded = RoutingTable(marks=many)
    crowded.merge(record(), NOW)
    crowded.expire(NOW)
    kept = crowded.marks()
    assert len(kept) == MARKS_MAX
    assert ME.peer in kept
    assert "10" not in kept
    assert f"{MARKS_MAX + 9}" in kept


def test_a_mark_never_goes_back() -> None:
    table = RoutingTable()
    table.merge(record(sequence=6), NOW)
    higher = {ME.peer: replace(table.marks()[ME.peer], sequence=9)}
    again = RoutingTable(marks=higher)
    with pytest.raises(RecordRolledBack):
        again.merge(record(sequence=8), NOW)
    assert again.marks() == higher


# --- newcomers ------------------------------------------------------------------------------------------------------


def small(records_max: int = 8, newcomers_max: int = 6) -> RoutingTable:
    return RoutingTable(records_max=records_max, newcomers_max=newcomers_max)


def test_thousands_of_invented_identities_push_out_nobody_who_was_reached() -> None:
    table = small(records_max=64, newcomers_max=48)
    known = crowd(8, seed=1)
    table.merge(record(ME), NOW)
    for one in known:
        table.merge(record(one), NOW, "a friend")
        table.reached(one.peer, NOW)
    honest = crowd(8, seed=2)
    for one in honest:
        table.merge(record(one), NOW, "another friend")
    refused = 0
    for n, one in enumerate(crowd(2_000, seed=3)):
        try:
            table.merge(record(one, life_s=86_000), NOW + n // 100 * WINDOW_S, "a liar")
        except Overloaded:
            refused += 1
        assert len(table.records()) <= 64
    assert {ME.peer, *(one.peer for one in known + honest)} <= set(table.records())
    assert refused == 2_000 - (48 - 8)
    assert set(table.marks()) == {ME.peer, *(one.peer for one in known)}
    assert isinstance(table.merge(record(OTHER), NOW, "a third friend"), Accepted)


def test_of_those_that_answer_at_one_place_so_many_stay_and_no_more() -> None:
    """Identities and ports cost nothing there, an address does."""
    table = RoutingTable(newcomers_max=8)
    hosts = ("10.0.0.1", "10.0.1", "[2001:db8::%x]", "n%d.example.org", "%d.n.example.org")
    for place in ((hosts[0], hosts[1]), hosts[2:3], hosts[3:]):
        for n, one in enumerate(crowd(REACHED_OF_SITE_MAX + 2, seed=hosts.index(place[0]))):
            host = place[n % len(place)]
            table.merge(record(one, at=f"{host % n if '%' in host else host}:{n + 1}"), NOW, "a liar")
            table.reached(one.peer, NOW)
            table.reached(one.peer, NOW)
            assert table.is_reached(one.peer) == (n < REACHED_OF_SITE_MAX)
    assert len(table.marks()) == 3 * REACHED_OF_SITE_MAX


def test_who_goes_or_answers_elsewhere_leaves_its_place_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.reached.REACHED_OF_SITE_MAX", 1)
    table = RoutingTable()
    one, two, three = crowd(3)
    table.merge(record(one, at="a:1", life_s=60), NOW, "a")
    table.merge(record(two, at="a:2", life_s=80_000), NOW, "a")
    for each in (one, two):
        table.reached(each.peer, NOW + 60)
    assert table.expire(NOW + 60) == [one.peer]
    table.reached(two.peer, NOW + 61)
    assert table.is_reached(two.peer)
    table.merge(record(one, 6, at="a:1", now=NOW + 70), NOW + 70, "a")
    assert not table.is_reached(one.peer), "its mark brings it back, but not its place"
    table.merge(record(two, 6, at="b:1", now=NOW + 70), NOW + 70, "a")
    table.reached(one.peer, NOW + 71)
    assert not table.is_reached(one.peer), "the other one has not answered elsewhere yet"
    table.reached(two.peer, NOW + 71)
    table.reached(one.peer, NOW + 71)
    assert table.is_reached(one.peer)
    table.merge(record(three, at="b:2"), NOW + 71, "a")
    table.reached(three.peer, NOW + 71)
    assert not table.is_reached(three.peer)


def test_a_newcomer_that_goes_on_answering_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.reached.REACHED_OF_SITE_MAX", 1)
    table = RoutingTable()
    one, two, silent = crowd(3)
    for each in (one, two, silent):
        table.merge(record(each, life_s=80_000), NOW, "a")
    for each in (one, two):
        table.reached(each.peer, NOW + 100)
    assert table.expire(NOW + NEWCOMER_S_MAX) == [silent.peer]
    assert table.expire(NOW + NEWCOMER_S_MAX + 100) == [two.peer]


def test_a_sender_introduces_so_many_in_a_minute_and_no_more() -> None:
    table = RoutingTable()
    many = crowd(NEWCOMERS_OF_SENDER_MAX + 1)
    for one in many[:-1]:
        table.merge(record(one), NOW, "a")
    forged = sign(replace(table.get(many[0].peer), public_key=OTHER.public_key), ME)
    for data in (record(many[-1]), forged):  # a forged one is not even looked at
        with pytest.raises(Overloaded) as error:
            table.merge(data, NOW + 20, "a")
        assert error.value.retry_after_s == WINDOW_S - 20
    assert isinstance(table.merge(record(many[0], 6), NOW + 20, "a"), Accepted)  # of whom it is known
    assert isinstance(table.merge(record(many[-1]), NOW + 20, "b"), Accepted)
    assert isinstance(table.merge(record(OTHER), NOW + WINDOW_S, "a"), Accepted)


def test_so_many_senders_introduce_somebody_within_a_minute_and_no_more() -> None:
    table = RoutingTable()
    for n, one in enumerate(crowd(NEWCOMER_SENDERS_MAX)):
        table.merge(record(one), NOW, f"{n}")
    with pytest.raises(Overloaded):
        table.merge(record(OTHER), NOW, "another")
    assert isinstance(table.merge(record(OTHER), NOW, "0"), Accepted)
    assert isinstance(table.merge(record(ME), NOW + WINDOW_S, "another"), Accepted)


def test_where_there_is_no_room_the_greediest_sender_gives_way() -> None:
    table = small()
    of_a, of_b = crowd(5, seed=1), crowd(4, seed=2)
    for one in of_a:
        table.merge(record(one), NOW, "a")
    for one in of_b[:3]:
        table.merge(record(one), NOW, "b")
    assert {one.peer for one in of_a[2:] + of_b[:3]} == set(table.records())
    with pytest.raises(Overloaded):  # each has three
        table.merge(record(of_b[3]), NOW, "b")
    assert len(table.records()) == 6


def test_a_newcomer_that_nobody_reaches_is_forgotten_with_its_mark() -> None:
    table = RoutingTable()
    table.merge(record(life_s=80_000), NOW, "a")
    table.merge(record(OTHER, life_s=80_000), NOW, "a")
    assert not table.is_reached(OTHER.peer)
    table.reached(OTHER.peer, NOW)
    assert table.is_reached(OTHER.peer)
    assert table.expire(NOW + NEWCOMER_S_MAX - 1) == []
    assert table.expire(NOW + NEWCOMER_S_MAX) == [ME.peer]
    assert set(table.marks()) == {OTHER.peer}


def test_who_was_reached_before_is_no_newcomer_when_it_comes_back() -> None:
    table = small()
    table.merge(record(ME), NOW, "a")
    table.reached(ME.peer, NOW)
    again = RoutingTable(marks=table.marks(), records_max=8, newcomers_max=6)
    for one in crowd(6):
        again.merge(record(one), NOW, "a")
    assert isinstance(again.merge(record(ME), NOW, "a"), Accepted)
    assert again.is_reached(ME.peer)


def test_a_full_table_takes_nobody_new_and_loses_nobody_it_reached() -> None:
    table = small(records_max=4, newcomers_max=3)
    many = crowd(4)
    for n, one in enumerate(many[:2]):
        table.merge(record(one, now=NOW + 10 * n), NOW + 10 * n)
    for one in many[2:]:
        table.merge(record(one, now=NOW + 10), NOW + 10, "a")
    assert isinstance(table.merge(record(ME, now=NOW + 10), NOW + 10), Accepted)  # in the place of a newcomer
    assert many[2].peer not in table.records()
    table.reached(many[3].peer, NOW)
    for sender in (None, "a"):
        with pytest.raises(Overloaded):
            table.merge(record(OTHER, now=NOW + 10), NOW + 10, sender)
    assert isinstance(table.merge(record(many[1], 6, now=NOW + 10), NOW + 10), Accepted)
    assert isinstance(table.merge(record(OTHER, now=NOW + 600), NOW + 600), Accepted)  # the first one has expired
    assert len(table.records()) == 4


def test_the_limits_leave_room_for_ten_thousand_and_for_the_reached() -> None:
    assert NEWCOMERS_MAX > 10_000
    assert RECORDS_MAX - NEWCOMERS_MAX >= 4096
    assert RECORDS_MAX >= 16_384


# --- grants ---------------------------------------------------------------------------------------------------------

OPERATOR = Identity.create()
CLOSED = networks.permissioned(OPERATOR.public_key)


def granted(identity: Identity, issued_s_ago: int = 10) -> bytes:
    now_ms = int(NOW * 1000)
    return grants.sign(Grant(identity.peer, now_ms - issued_s_ago * 1000, now_ms + 1_000_000), OPERATOR)


def of_closed(identity: Identity, grant: bytes | None = None, sequence: int = 5) -> bytes:
    return record(identity, sequence, network=CLOSED, grant=granted(identity) if grant is None else grant)


def test_invented_identities_do_not_enter_a_permissioned_network_at_all() -> None:
    table = RoutingTable(CLOSED)
    for one in crowd(100):
        with pytest.raises(GrantMissing):
            table.merge(of_closed(one, b""), NOW, "a liar")
    assert isinstance(table.merge(of_closed(ME), NOW, "a liar"), Accepted)
    assert table.is_reached(ME.peer)
    assert len(table.records()) == 1


def test_a_revocation_puts_a_peer_out_at_once_and_keeps_it_out() -> None:
    table = RoutingTable(CLOSED)
    for one in (ME, OTHER):
        table.merge(of_closed(one), NOW)
    signed = lists.sign(Revocations().next(ME.peer, int(NOW * 1000)), OPERATOR)
    outcome, gone = table.merge_revocations(signed, NOW)
    assert isinstance(outcome, lists.Newer)
    assert gone == [ME.peer]
    assert list(table.records()) == [OTHER.peer]
    with pytest.raises(GrantRevoked):
        table.merge(of_closed(ME, sequence=6), NOW)
    assert table.revocations == signed
    assert table.merge_revocations(signed, NOW) == (lists.Same(), [])


def test_a_revocation_leaves_in_who_has_a_later_grant() -> None:
    table = RoutingTable(CLOSED)
    table.merge(of_closed(ME), NOW)
    signed = lists.sign(Revocations().next(ME.peer, int(NOW * 1000) - 20_000), OPERATOR)
    assert table.merge_revocations(signed, NOW)[1] == []
    assert list(table.records()) == [ME.peer]


def test_a_record_whose_grant_has_ended_goes_with_the_next_list() -> None:
    table = RoutingTable(CLOSED)
    table.merge(of_closed(ME), NOW)
    signed = lists.sign(Revocations().next(ME.peer, int(NOW * 1000) - 20_000), OPERATOR)
    assert table.merge_revocations(signed, NOW + 1000)[1] == [ME.peer]


# --- holders and snapshots --------------------------------------------------------------------------------------------


def random_held(random: Random) -> tuple[Held, ...]:
    start = random.randrange(6)
    span = range(start, random.randrange(start, 8))
    experts = {layer: mask for layer in range(8) if (mask := random.getrandbits(8))}
    return (Held(MODEL, True, span or range(0), bool(span) and start == 0, bool(span), experts),)


def scanned(table: RoutingTable, layer: int, expert: int | None) -> set[PeerId]:
    found = set()
    for peer, known in table.records().items():
        for held in known.held:
            if held.experts.get(layer, 0) >> expert & 1 if expert is not None else layer in held.span:
                found.add(peer)
    return found


def test_the_index_of_holders_says_what_a_scan_of_all_records_says() -> None:
    random = Random(4)
    table = RoutingTable()
    people = crowd(30)
    for step in range(300):
        one = random.choice(people)
        if random.random() < 0.1:
            table.expire(NOW + step)
        life_s = random.choice([1, 5, 600])
        table.merge(record(one, step + 1, now=NOW + step, life_s=life_s, held=random_held(random)), NOW + step)
        layer, expert = random.randrange(8), random.randrange(8)
        for _ in range(2):  # the second answer is a kept one
            assert set(table.holders(MODEL, f"expert.{layer}.{expert}")) == scanned(table, layer, expert)
            assert set(table.holders(MODEL, f"trunk.{layer}")) == scanned(table, layer, None)
        heads = {peer for peer, known in table.records().items() if known.held[0].head}
        assert set(table.holders(MODEL, "head")) == heads
        assert table.held(MODEL) == {peer: known.held[0] for peer, known in table.records().items()}


def test_of_what_nobody_holds_there_are_no_holders() -> None:
    table = RoutingTable()
    assert table.holders(MODEL, "head") == ()
    assert table.held(MODEL) == {}
    table.merge(record(held=(Held(MODEL),)), NOW)
    assert table.holders(MODEL, "expert.3.4") == table.holders(MODEL, "trunk.0") == ()
    with pytest.raises(InvalidManifest):
        table.holders(MODEL, "expert.x")
    table.expire(NOW + 600)
    assert table.held(MODEL) == {}


def test_a_snapshot_stays_as_it_was_and_costs_nothing_twice() -> None:
    table = RoutingTable()
    table.merge(record(ME, held=(Held(MODEL),)), NOW)
    records, held = table.records(), table.held(MODEL)
    assert table.records() == records
    table.merge(record(OTHER, held=(Held(MODEL),)), NOW)
    table.expire(NOW + 600)
    assert list(records) == list(held) == [ME.peer]
    assert not table.records()
    with pytest.raises(TypeError):
        records[OTHER.peer] = records[ME.peer]
