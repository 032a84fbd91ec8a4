"""Whatever bytes come in where something signed is expected: a typed error, or exactly what was signed."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_signed_vectors import CLOSED, NODE, NOW_MS, OPEN, OPERATOR, READ, WRITE

from node import grant as grants
from node import load_report, marks_file, operator_signed, revocations
from node import record as records
from node.expert_sets import decode, encode
from node.revocations import Revocations
from protos import peers_pb2 as pb
from protos.errors import InvalidRecord, ShoalError
from protos.limits import EXPERTS_MAX, LAYERS_MAX
from protos.transcript import GRANT_DOMAIN, LOAD_DOMAIN, RECORD_DOMAIN, REVOCATIONS_DOMAIN

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = {name: write() for name, write in WRITE.items()}
short = st.binary(max_size=40)
numbers = st.one_of(st.integers(0, 3), st.integers(NOW_MS - 9, NOW_MS + 9), st.integers(0, 2**64 - 1))
small = st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1))


@pytest.mark.parametrize("name", GOLDEN)
@given(data=st.data())
def test_damaged_bytes_are_a_typed_error_or_what_was_signed(name: str, data: st.DataObject) -> None:
    golden = GOLDEN[name]
    start = data.draw(st.integers(0, len(golden)))
    stop = data.draw(st.integers(start, min(start + 8, len(golden))))
    damaged = golden[:start] + data.draw(st.binary(max_size=8)) + golden[stop:]
    with contextlib.suppress(ShoalError):
        assert READ[name](damaged)


sets = st.builds(
    pb.ExpertSet,
    first_layer=small,
    layers=small,
    bits=st.one_of(st.just(b""), short),
    each=st.one_of(st.just(b""), short),
    runs=st.lists(small, max_size=6),
)


@given(st.lists(sets, max_size=6))
def test_any_sets_of_experts_are_refused_or_come_back(messages: list[pb.ExpertSet]) -> None:
    try:
        experts = decode(messages)
    except InvalidRecord:
        return
    assert all(0 <= layer < LAYERS_MAX and 0 <= mask < 1 << EXPERTS_MAX for layer, mask in experts.items())
    assert decode(encode(experts)) == {layer: mask for layer, mask in experts.items() if mask}


held = st.builds(
    pb.Holding,
    model_id=st.sampled_from(["ab" * 32, "cd" * 32, "x"]),
    first_layer=small,
    layers=small,
    embed=st.booleans(),
    head=st.booleans(),
    experts=st.lists(sets, max_size=3),
)
messages = st.builds(
    pb.Record,
    public_key=st.just(NODE.public_key),
    addresses=st.lists(st.sampled_from(["h:1", "[::1]:2", "h", "\x1b:1"]), max_size=5),
    certificate_sha256=st.sampled_from([b"", b"c" * 32, b"c"]),
    zone=st.text(max_size=9),
    protocol=small,
    sequence=numbers,
    issued_at_ms=numbers,
    expires_at_ms=st.one_of(st.just(NOW_MS + 1000), numbers),
    holdings=st.lists(held, max_size=3),
    network=st.sampled_from([OPEN.id, CLOSED.id, b""]),
    grant=st.sampled_from([b"", b"?", GOLDEN["grant"]]),
)


@given(messages)
def test_any_record_that_its_node_signed_is_refused_or_comes_back(message: pb.Record) -> None:
    content = message.SerializeToString()
    data = pb.SignedRecord(record=content, signature=NODE.sign(RECORD_DOMAIN, content)).SerializeToString()
    for network in (OPEN, CLOSED):
        with contextlib.suppress(ShoalError):
            record = records.read(data, NOW_MS, network)
            assert records.read(records.sign(record, NODE), NOW_MS, network).sequence == record.sequence


@given(st.builds(pb.Grant, peer=st.one_of(short, st.just(b"p" * 32)), issued_at_ms=numbers, expires_at_ms=numbers))
def test_any_grant_that_its_operator_signed_is_refused_or_comes_back(message: pb.Grant) -> None:
    data = operator_signed.write(message.SerializeToString(), GRANT_DOMAIN, OPERATOR)
    with contextlib.suppress(ShoalError):
        grant = grants.read(data, CLOSED, NOW_MS)
        assert grants.read(grants.sign(grant, OPERATOR), CLOSED, NOW_MS) == grant


entries = st.builds(pb.Revocation, peer=st.sampled_from([b"a" * 32, b"b" * 32, b"c"]), at_ms=numbers)


@given(st.builds(pb.Revocations, version=numbers, issued_at_ms=numbers, revocations=st.lists(entries, max_size=3)))
def test_any_list_that_its_operator_signed_is_refused_or_comes_back(message: pb.Revocations) -> None:
    data = operator_signed.write(message.SerializeToString(), REVOCATIONS_DOMAIN, OPERATOR)
    with contextlib.suppress(ShoalError):
        found = revocations.read(data, CLOSED, NOW_MS)
        assert isinstance(found, Revocations)
        assert revocations.read(revocations.sign(found, OPERATOR), CLOSED, NOW_MS) == found


hot = st.builds(pb.HotExpert, layer=small, expert=small, rows_per_s=st.floats(width=32))


@given(
    st.builds(
        pb.LoadReport,
        network=st.sampled_from([OPEN.id, b""]),
        public_key=st.just(NODE.public_key),
        time_ms=st.one_of(st.just(NOW_MS), numbers),
        queue=small,
        tokens_per_s=st.floats(),
        model=st.sampled_from([b"", b"m" * 32, b"m"]),
        hottest=st.lists(hot, max_size=9),
    )
)
def test_any_report_that_its_node_signed_is_refused_or_comes_back(message: pb.LoadReport) -> None:
    content = message.SerializeToString()
    data = pb.SignedLoad(report=content, signature=NODE.sign(LOAD_DOMAIN, content)).SerializeToString()
    with contextlib.suppress(ShoalError):
        report = load_report.read(data, OPEN, NOW_MS / 1000)
        assert load_report.read(load_report.sign(report, NODE), OPEN, NOW_MS / 1000) == report


@given(st.binary(max_size=300))
def test_any_file_of_marks_is_a_problem_or_marks(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path: Path = tmp_path_factory.getbasetemp() / "marks"
    path.write_bytes(data)
    found = marks_file.load(path)
    assert found.problem is not None
    assert found.marks == {}
