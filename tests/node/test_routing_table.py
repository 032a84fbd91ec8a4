"""PROTOCOL.md section 14: the newest valid record of every peer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from node.identity import Identity
from node.record import Record, sign
from node.routing_table import Accepted, RoutingTable, Same, Stale
from protos import peers_pb2 as pb
from protos.errors import InvalidRecord, InvalidSignature, Overloaded
from protos.limits import RECORDS_MAX

NOW = 1_800_000_000.0
ME, OTHER = Identity.create(), Identity.create()


def record(identity: Identity = ME, sequence: int = 5, zone: str = "", now: float = NOW) -> pb.SignedRecord:
    now_ms = int(now * 1000)
    made = Record(identity.public_key, ("h:1",), None, sequence, now_ms, now_ms + 600_000, zone=zone)
    return sign(made, identity)


def test_a_newer_record_takes_the_place_of_an_older_one() -> None:
    table = RoutingTable()
    assert isinstance(table.merge(record(), NOW), Accepted)
    outcome = table.merge(record(sequence=6, zone="new"), NOW)
    assert isinstance(outcome, Accepted)
    assert table.get(ME.peer) == outcome.record
    assert outcome.record.zone == "new"
    assert table.signed()[ME.peer] == record(sequence=6, zone="new")
    assert list(table.records()) == [ME.peer]


def test_the_same_record_again_is_no_news_and_costs_no_signature() -> None:
    table = RoutingTable()
    table.merge(record(), NOW)
    forged = pb.SignedRecord(record=record().record, signature=b"x" * 64)
    assert isinstance(table.merge(forged, NOW), Same)
    assert table.signed()[ME.peer] == record()


def test_a_record_is_never_rolled_back() -> None:
    table = RoutingTable()
    table.merge(record(sequence=6), NOW)
    assert isinstance(table.merge(record(sequence=5, zone="old"), NOW), Stale)
    assert table.get(ME.peer).sequence == 6


def test_of_two_with_one_sequence_the_one_that_is_known_stays() -> None:
    table = RoutingTable()
    table.merge(record(zone="one"), NOW)
    with pytest.raises(InvalidRecord, match="one sequence"):
        table.merge(record(zone="two"), NOW)
    assert table.get(ME.peer).zone == "one"


def test_what_is_refused_changes_nothing() -> None:
    table = RoutingTable()
    table.merge(record(), NOW)
    stolen = sign(replace(table.get(ME.peer), sequence=9), OTHER)
    for wrong, error in (
        (stolen, InvalidSignature),
        (record(sequence=9, now=NOW - 600), InvalidRecord),
        (record(sequence=9, now=NOW + 301), InvalidRecord),
        (pb.SignedRecord(), InvalidRecord),
    ):
        with pytest.raises(error):
            table.merge(wrong, NOW)
    assert table.signed() == {ME.peer: record()}


def test_an_expired_record_is_forgotten_and_not_taken_again() -> None:
    table = RoutingTable()
    table.merge(record(), NOW)
    table.merge(record(OTHER, now=NOW + 10), NOW + 10)
    assert table.expire(NOW + 599.9) == []
    with pytest.raises(InvalidRecord):
        table.merge(record(), NOW + 600)
    assert table.expire(NOW + 600) == [ME.peer]
    assert list(table.records()) == [OTHER.peer]
    with pytest.raises(InvalidRecord):
        table.merge(record(), NOW + 600)


def test_a_full_table_takes_nobody_new_and_loses_nobody() -> None:
    table = RoutingTable()
    first = Identity.create()
    table.merge(record(first), NOW)
    crowd = [Identity.create() for _ in range(RECORDS_MAX - 1)]
    for identity in crowd:
        table.merge(record(identity, now=NOW + 10), NOW + 10)
    with pytest.raises(Overloaded):
        table.merge(record(ME, now=NOW + 10), NOW + 10)
    assert table.get(ME.peer) is None
    assert isinstance(table.merge(record(crowd[0], 6, now=NOW + 10), NOW + 10), Accepted)
    assert isinstance(table.merge(record(ME, now=NOW + 600), NOW + 600), Accepted)  # the first one has expired
    assert table.get(first.peer) is None
    assert len(table.records()) == RECORDS_MAX
