"""PROTOCOL.md section 14: one record, from its signature to what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.identity import Identity
from node.record import Held, Record, read, sign
from protos import peers_pb2 as pb
from protos.errors import InvalidRecord, InvalidSignature, ShoalError
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    NAME_CHARS_MAX,
    RECORD_ADDRESSES_MAX,
    RECORD_BYTES_MAX,
    RECORD_HOLDINGS_MAX,
    RECORD_S_MAX,
)
from protos.transcript import RECORD_DOMAIN

NOW_MS = 1_800_000_000_000
ME, OTHER = Identity.create(), Identity.create()
MODEL = "0123456789abcdef" * 4


def record(**changed: object) -> Record:
    plain = Record(
        public_key=ME.public_key,
        addresses=("127.0.0.1:7645",),
        certificate_sha256=bytes(range(32)),
        sequence=7,
        issued_at_ms=NOW_MS,
        expires_at_ms=NOW_MS + 600_000,
        zone="a zone",
        owner="an owner",
        version="0.1.0",
        held=(Held(MODEL, True, range(4), True, False, {0: 5, 1: 5, 3: 1 << 300}),),
        sessions_max=8,
        kv_bytes_max=1 << 40,
    )
    return replace(plain, **changed)


def message(**changed: object) -> pb.Record:
    made = pb.Record.FromString(sign(record(), ME).record)
    for name, value in changed.items():
        made.ClearField(name)
        made.MergeFrom(pb.Record(**{name: value}))
    return made


def signed(content: pb.Record | bytes, by: Identity = ME) -> pb.SignedRecord:
    encoded = content if isinstance(content, bytes) else content.SerializeToString()
    return pb.SignedRecord(record=encoded, signature=by.sign(RECORD_DOMAIN, encoded))


def test_a_record_says_what_was_signed() -> None:
    got = read(sign(record(), ME), NOW_MS)
    assert got == record()
    assert (got.peer, got.address) == (ME.peer, "127.0.0.1:7645")
    bare = record(certificate_sha256=None, held=(), zone="", owner="", version="")
    assert read(sign(bare, ME), NOW_MS) == bare


layers = st.integers(0, LAYERS_MAX - 1)
spans = st.builds(
    lambda start, count: range(start, start + count) if count else range(0), st.integers(1, 500), st.integers(0, 500)
)
masks = st.integers(1, (1 << EXPERTS_MAX) - 1)
helds = st.builds(Held, st.just(MODEL), st.booleans(), spans, experts=st.dictionaries(layers, masks, max_size=40))


@given(helds)
def test_any_holding_comes_back_as_it_was(held: Held) -> None:
    assert read(sign(record(held=(held,)), ME), NOW_MS).held == (held,)


def test_the_same_experts_of_consecutive_layers_are_said_once() -> None:
    held = Held(MODEL, experts=dict.fromkeys(range(3, 61), (1 << 384) - 1) | {70: 0})
    (group,) = pb.Record.FromString(sign(record(held=(held,)), ME).record).holdings[0].experts
    assert (group.first_layer, group.layers, group.bits) == (3, 58, b"\xff" * 48)


def test_another_key_cannot_sign_it() -> None:
    with pytest.raises(InvalidSignature):
        read(sign(record(), OTHER), NOW_MS)
    with pytest.raises(InvalidSignature):
        read(signed(message(public_key=OTHER.public_key)), NOW_MS)


def test_a_changed_byte_or_another_domain_is_no_signature() -> None:
    good = sign(record(), ME)
    changed = pb.SignedRecord(record=good.record.replace(b"a zone", b"A zone"), signature=good.signature)
    foreign = pb.SignedRecord(record=good.record, signature=ME.sign(b"another", good.record))
    for wrong in (changed, foreign):
        with pytest.raises(InvalidSignature):
            read(wrong, NOW_MS)


def test_a_record_holds_until_it_expires() -> None:
    read(sign(record(), ME), NOW_MS + 599_999)
    with pytest.raises(InvalidRecord, match="expired"):
        read(sign(record(), ME), NOW_MS + 600_000)


def test_a_record_from_the_future_is_refused_beyond_the_difference_of_clocks() -> None:
    read(sign(record(), ME), NOW_MS - CLOCK_DIFFERENCE_S_MAX * 1000)
    with pytest.raises(InvalidRecord, match="clocks"):
        read(sign(record(), ME), NOW_MS - CLOCK_DIFFERENCE_S_MAX * 1000 - 1)


def test_a_record_may_hold_for_so_long_and_no_longer() -> None:
    longest = record(expires_at_ms=NOW_MS + RECORD_S_MAX * 1000)
    read(sign(longest, ME), NOW_MS)
    for wrong in (longest.expires_at_ms + 1, NOW_MS, NOW_MS - 1):
        with pytest.raises(InvalidRecord, match="no time, or for more"):
            read(sign(record(expires_at_ms=wrong), ME), NOW_MS)


def test_a_record_may_have_so_many_bytes_and_no_more() -> None:
    content = message()
    padded = content.SerializeToString()
    room = RECORD_BYTES_MAX - len(padded)
    field = b"\xfa\x7f"  # field 2047, of bytes, which nobody knows
    length = room - len(field) - 3
    largest = padded + field + bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14]) + bytes(length)
    assert len(largest) == RECORD_BYTES_MAX
    assert read(signed(largest), NOW_MS) == record()
    with pytest.raises(InvalidRecord, match=str(RECORD_BYTES_MAX + 1)):
        read(pb.SignedRecord(record=largest + b"\0", signature=b"x" * 64), NOW_MS)
    many = {layer: layer + 1 << EXPERTS_MAX - 11 for layer in range(200)}
    with pytest.raises(InvalidRecord, match="bytes"):
        sign(record(held=(Held(MODEL, experts=many),)), ME)


WRONG = {
    "no key": {"public_key": b""},
    "no address": {"addresses": []},
    "too many addresses": {"addresses": ["h:1"] * (RECORD_ADDRESSES_MAX + 1)},
    "a wrong address": {"addresses": ["h:1", "nowhere"]},
    "a short certificate": {"certificate_sha256": b"x" * 31},
    "a long zone": {"zone": "z" * (NAME_CHARS_MAX + 1)},
    "a zone that a terminal obeys": {"zone": "\x1b[2J"},
    "a long owner": {"owner": "z" * (NAME_CHARS_MAX + 1)},
    "a long version": {"version": "z" * (NAME_CHARS_MAX + 1)},
    "no protocol": {"protocol": 0},
    "no sequence": {"sequence": 0},
    "too many models": {"holdings": [pb.Holding(model_id=f"{n:064}") for n in range(RECORD_HOLDINGS_MAX + 1)]},
    "a model twice": {"holdings": [pb.Holding(model_id=MODEL)] * 2},
    "no model": {"holdings": [pb.Holding(model_id="x" * 64)]},
    "a span beyond": {"holdings": [pb.Holding(model_id=MODEL, first_layer=1, layers=LAYERS_MAX)]},
    "an endless span": {"holdings": [pb.Holding(model_id=MODEL, first_layer=2**32 - 1, layers=2**32 - 1)]},
    "an embed in the middle": {"holdings": [pb.Holding(model_id=MODEL, first_layer=1, layers=1, embed=True)]},
    "an embed of nothing": {"holdings": [pb.Holding(model_id=MODEL, embed=True)]},
    "a head of nothing": {"holdings": [pb.Holding(model_id=MODEL, head=True)]},
}
EXPERTS = {
    "of no layer": [pb.ExpertSet(bits=b"\1")],
    "of endless layers": [pb.ExpertSet(layers=2**32 - 1, bits=b"\1")],
    "beyond the layers": [pb.ExpertSet(first_layer=LAYERS_MAX, layers=1, bits=b"\1")],
    "beyond the experts": [pb.ExpertSet(layers=1, bits=bytes(EXPERTS_MAX // 8 + 1))],
    "of a layer twice": [pb.ExpertSet(layers=2, bits=b"\1"), pb.ExpertSet(first_layer=1, layers=1, bits=b"\2")],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_record_that_contradicts_itself_or_a_limit_is_refused(wrong: str) -> None:
    with pytest.raises(InvalidRecord):
        read(signed(message(**WRONG[wrong])), NOW_MS)


@pytest.mark.parametrize("wrong", EXPERTS)
def test_experts_that_cannot_be_are_refused(wrong: str) -> None:
    holding = pb.Holding(model_id=MODEL, experts=EXPERTS[wrong])
    with pytest.raises(InvalidRecord):
        read(signed(message(holdings=[holding])), NOW_MS)


def test_the_limits_themselves_are_allowed() -> None:
    largest = record(
        addresses=("h:1",) * RECORD_ADDRESSES_MAX,
        zone="z" * NAME_CHARS_MAX,
        held=(
            Held(MODEL, span=range(LAYERS_MAX), embed=True, head=True, experts={LAYERS_MAX - 1: 1 << EXPERTS_MAX - 1}),
            *(Held(f"{n:064}") for n in range(RECORD_HOLDINGS_MAX - 1)),
        ),
    )
    assert read(sign(largest, ME), NOW_MS) == largest


@given(st.binary(max_size=300))
def test_any_bytes_are_a_typed_error(content: bytes) -> None:
    for one in (pb.SignedRecord(record=content, signature=b"x" * 64), signed(content)):
        with pytest.raises((InvalidRecord, InvalidSignature)) as error:
            read(one, NOW_MS)
        assert isinstance(error.value, ShoalError)


def test_fields_of_a_later_version_are_kept_under_the_signature() -> None:
    later = message().SerializeToString() + b"\xfa\x7f\x01!"
    assert read(signed(later), NOW_MS) == record()
