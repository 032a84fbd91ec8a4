"""PROTOCOL.md section 14: how busy a node says that it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.identity import Identity
from node.load_report import Hot, LoadReport, LoadReports, read, sign
from node.network import open_network
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest, InvalidSignature, WrongNetwork
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    LOAD_BYTES_MAX,
    LOAD_HOTTEST_MAX,
    LOAD_S_MAX,
    RECORDS_MAX,
)
from protos.transcript import LOAD_DOMAIN

NOW = 1_800_000_000.0
ME, OTHER = Identity.create(), Identity.create()
NETWORK = open_network()
HOT = Hot(LAYERS_MAX - 1, EXPERTS_MAX - 1, 1.5)
REPORT = LoadReport(NETWORK.id, ME.public_key, int(NOW * 1000), 3, 1 << 40, 12.5, "ab" * 32, (HOT,))


def signed(**changed: object) -> bytes:
    message = pb.LoadReport.FromString(pb.SignedLoad.FromString(sign(REPORT, ME)).report)
    for name, value in changed.items():
        message.ClearField(name)
        message.MergeFrom(pb.LoadReport(**{name: value}))
    content = message.SerializeToString()
    return pb.SignedLoad(report=content, signature=ME.sign(LOAD_DOMAIN, content)).SerializeToString()


def test_a_report_says_what_was_signed() -> None:
    assert read(sign(REPORT, ME), NETWORK, NOW) == REPORT
    assert REPORT.peer == ME.peer
    bare = LoadReport(NETWORK.id, ME.public_key, int(NOW * 1000))
    assert read(sign(bare, ME), NETWORK, NOW) == bare


def test_the_longest_report_fits_and_one_byte_more_does_not() -> None:
    longest = replace(REPORT, hottest=(HOT,) * LOAD_HOTTEST_MAX, queue=2**32 - 1, kv_bytes_free=2**64 - 1)
    assert read(sign(longest, ME), NETWORK, NOW) == longest
    assert len(sign(longest, ME)) < 350 < LOAD_BYTES_MAX
    with pytest.raises(InvalidRequest, match="bytes"):
        read(bytes(LOAD_BYTES_MAX + 1), NETWORK, NOW)


def test_nobody_reports_for_another_or_for_another_network() -> None:
    with pytest.raises(InvalidSignature):
        read(sign(REPORT, OTHER), NETWORK, NOW)
    with pytest.raises(WrongNetwork):
        read(sign(REPORT, ME), open_network("other"), NOW)


def test_a_report_far_from_now_is_refused_either_way() -> None:
    for apart_s in (-CLOCK_DIFFERENCE_S_MAX, CLOCK_DIFFERENCE_S_MAX):
        read(sign(REPORT, ME), NETWORK, NOW + apart_s)
        with pytest.raises(InvalidRequest, match="clock"):
            read(sign(REPORT, ME), NETWORK, NOW + apart_s + math.copysign(0.1, apart_s))


WRONG = {
    "no key": {"public_key": b""},
    "a short model": {"model": b"x"},
    "experts of no model": {"model": b""},
    "too many experts": {"hottest": [pb.HotExpert()] * (LOAD_HOTTEST_MAX + 1)},
    "a layer too deep": {"hottest": [pb.HotExpert(layer=LAYERS_MAX)]},
    "an expert too many": {"hottest": [pb.HotExpert(expert=EXPERTS_MAX)]},
    "no number": {"tokens_per_s": math.nan},
    "less than nothing": {"tokens_per_s": -1.0},
    "endless rows": {"hottest": [pb.HotExpert(rows_per_s=math.inf)]},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_report_that_cannot_be_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidRequest):
        read(signed(**WRONG[wrong]), NETWORK, NOW)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_typed_error(content: bytes) -> None:
    for data in (
        content,
        pb.SignedLoad(report=content, signature=ME.sign(LOAD_DOMAIN, content)).SerializeToString(),
    ):
        with pytest.raises((InvalidRequest, InvalidSignature, WrongNetwork)):
            read(data, NETWORK, NOW)


def test_a_report_holds_for_seconds_from_its_arrival() -> None:
    reports = LoadReports(NETWORK)
    assert reports.merge(sign(REPORT, ME), NOW + 200, 7.0) == REPORT  # of a clock that is minutes off
    assert reports.get(ME.peer, 7.0 + LOAD_S_MAX - 0.1) == REPORT
    assert reports.get(ME.peer, 7.0 + LOAD_S_MAX) is None
    assert reports.get(OTHER.peer, NOW) is None


def test_a_report_is_not_replayed() -> None:
    reports = LoadReports(NETWORK)
    later = replace(REPORT, time_ms=REPORT.time_ms + 1, queue=9)
    reports.merge(sign(later, ME), NOW, NOW)
    for data in (sign(REPORT, ME), sign(later, ME)):
        assert reports.merge(data, NOW + LOAD_S_MAX, NOW + LOAD_S_MAX) is None
    assert reports.get(ME.peer, NOW + LOAD_S_MAX) is None
    reports.forget(ME.peer)
    assert reports.get(ME.peer, NOW) is None


def test_reports_are_kept_of_as_many_peers_as_a_table_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RECORDS_MAX == 1 << 14
    monkeypatch.setattr("node.load_report.RECORDS_MAX", 2)
    reports = LoadReports(NETWORK)
    people = [Identity.create() for _ in range(3)]
    for one in people:
        reports.merge(sign(replace(REPORT, public_key=one.public_key), one), NOW, NOW)
    assert [reports.get(one.peer, NOW) is None for one in people] == [True, False, False]
    assert len(reports._known) == 2


def test_the_same_report_again_costs_no_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    reports = LoadReports(NETWORK)
    data, calls = sign(REPORT, ME), []
    monkeypatch.setattr("node.load_report.verify", lambda *_: calls.append(1))
    assert [reports.merge(data, NOW, 0.0), reports.merge(data, NOW, 1.0)] == [REPORT, None]
    assert len(calls) == 1
    reports.forget(ME.peer)
    assert reports.merge(data, NOW, 2.0) == REPORT
    later = replace(REPORT, time_ms=REPORT.time_ms + 1)
    assert reports.merge(sign(later, ME), NOW, 2.0) == later
    assert len(reports._known) == 1
