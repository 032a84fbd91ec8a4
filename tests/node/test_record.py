"""PROTOCOL.md section 14: one record, from its signature to what it says."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import grant as grants
from node import network as networks
from node.grant import Grant
from node.identity import Identity
from node.network import Network, open_network
from node.record import Held, Record, opened, sign
from node.record import read as read_record
from node.revocations import Revocations
from protos import peers_pb2 as pb
from protos.errors import (
    GrantExpired,
    GrantMissing,
    GrantRevoked,
    InvalidGrant,
    InvalidRecord,
    InvalidSignature,
    RecordExpired,
    RecordFromFuture,
    RecordTooLarge,
    ShoalError,
    WrongNetwork,
)
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    EXPERTS_MAX,
    LAYERS_MAX,
    NAME_CHARS_MAX,
    RECORD_ADDRESSES_MAX,
    RECORD_BYTES_MAX,
    RECORD_EXPERT_LAYERS_MAX,
    RECORD_HOLDINGS_MAX,
    RECORD_S_MAX,
)
from protos.transcript import RECORD_DOMAIN

NOW_MS = 1_800_000_000_000
ME, OTHER, OPERATOR = Identity.create(), Identity.create(), Identity.create()
OPEN = open_network()
CLOSED = networks.permissioned(OPERATOR.public_key)
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


def read(data: bytes, now_ms: int, network: Network = OPEN) -> Record:
    return read_record(data, now_ms, network)


def message(**changed: object) -> pb.Record:
    made = pb.Record.FromString(opened(sign(record(), ME)).content)
    for name, value in changed.items():
        made.ClearField(name)
        made.MergeFrom(pb.Record(**{name: value}))
    return made


def signed(content: pb.Record | bytes, by: Identity = ME, domain: bytes = RECORD_DOMAIN) -> bytes:
    encoded = content if isinstance(content, bytes) else content.SerializeToString()
    return pb.SignedRecord(record=encoded, signature=by.sign(domain, encoded)).SerializeToString()


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
helds = st.builds(Held, st.just(MODEL), st.booleans(), spans, experts=st.dictionaries(layers, masks, max_size=14))


@given(helds)
def test_any_holding_comes_back_as_it_was(held: Held) -> None:
    assert read(sign(record(held=(held,)), ME), NOW_MS).held == (held,)


def test_the_same_experts_of_consecutive_layers_are_said_once() -> None:
    held = Held(MODEL, experts=dict.fromkeys(range(3, 61), (1 << 384) - 1) | {70: 0})
    (group,) = opened(sign(record(held=(held,)), ME)).message.holdings[0].experts
    assert (group.first_layer, group.layers, group.bits, list(group.runs)) == (3, 58, b"", [0, 384])


def test_another_key_cannot_sign_it() -> None:
    with pytest.raises(InvalidSignature):
        read(sign(record(), OTHER), NOW_MS)
    with pytest.raises(InvalidSignature):
        read(signed(message(public_key=OTHER.public_key)), NOW_MS)


def test_a_changed_byte_or_another_domain_is_no_signature() -> None:
    changed = sign(record(), ME).replace(b"a zone", b"A zone")
    foreign = signed(message(), domain=b"shoal load v1")
    for wrong in (changed, foreign):
        with pytest.raises(InvalidSignature):
            read(wrong, NOW_MS)


def test_a_record_holds_until_it_expires() -> None:
    read(sign(record(), ME), NOW_MS + 599_999)
    with pytest.raises(RecordExpired, match="expired"):
        read(sign(record(), ME), NOW_MS + 600_000)


def test_a_record_from_the_future_is_refused_beyond_the_difference_of_clocks() -> None:
    read(sign(record(), ME), NOW_MS - CLOCK_DIFFERENCE_S_MAX * 1000)
    with pytest.raises(RecordFromFuture, match="clocks"):
        read(sign(record(), ME), NOW_MS - CLOCK_DIFFERENCE_S_MAX * 1000 - 1)


def test_a_record_may_hold_for_so_long_and_no_longer() -> None:
    longest = record(expires_at_ms=NOW_MS + RECORD_S_MAX * 1000)
    read(sign(longest, ME), NOW_MS)
    for wrong in (longest.expires_at_ms + 1, NOW_MS, NOW_MS - 1):
        with pytest.raises(InvalidRecord, match="no time, or for more"):
            read(sign(record(expires_at_ms=wrong), ME), NOW_MS)


def test_a_record_may_have_so_many_bytes_and_no_more() -> None:
    content = message().SerializeToString()
    length = RECORD_BYTES_MAX - len(signed(content)) - 4
    unknown = b"\xfa\x7f" + bytes([length & 127 | 128, length >> 7]) + bytes(length)
    largest = signed(content + unknown)
    assert len(largest) == RECORD_BYTES_MAX
    assert read(largest, NOW_MS) == record()
    with pytest.raises(RecordTooLarge, match=str(RECORD_BYTES_MAX + 1)):
        read(largest + b"\0", NOW_MS)
    many = {layer: int.from_bytes(Random(layer).randbytes(512), "little") for layer in range(20)}
    with pytest.raises(RecordTooLarge, match="bytes"):
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
    "beyond the experts, by layer": [pb.ExpertSet(layers=2, each=bytes(EXPERTS_MAX // 4 + 2))],
    "not as many as layers": [pb.ExpertSet(layers=2, each=bytes(3))],
    "of fewer bytes than layers": [pb.ExpertSet(layers=3, each=bytes(2))],
    "beyond the experts, by runs": [pb.ExpertSet(layers=1, runs=[EXPERTS_MAX, 1])],
    "in half a run": [pb.ExpertSet(layers=1, runs=[1])],
    "in an empty run": [pb.ExpertSet(layers=1, runs=[1, 0])],
    "in a run beyond numbers": [pb.ExpertSet(layers=1, runs=[2**32 - 1, 2**32 - 1])],
    "said in no way": [pb.ExpertSet(layers=1)],
    "said in two ways": [pb.ExpertSet(layers=1, bits=b"\1", runs=[0, 1])],
    "of more layers than memory is for": [pb.ExpertSet(layers=RECORD_EXPERT_LAYERS_MAX + 1, bits=b"\1")],
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
    for one in (content, pb.SignedRecord(record=content, signature=b"x" * 64).SerializeToString(), signed(content)):
        with pytest.raises((InvalidRecord, InvalidSignature)) as error:
            read(one, NOW_MS)
        assert isinstance(error.value, ShoalError)


def test_fields_of_a_later_version_are_kept_under_the_signature() -> None:
    later = message().SerializeToString() + b"\xfa\x7f\x01!"
    assert read(signed(later), NOW_MS) == record()


def test_layers_with_experts_are_counted_over_all_models() -> None:
    half = RECORD_EXPERT_LAYERS_MAX // 2
    held = [Held(f"{n:064}", experts=dict.fromkeys(range(half), 1)) for n in range(2)]
    assert read(sign(record(held=tuple(held)), ME), NOW_MS).held == tuple(held)
    with pytest.raises(InvalidRecord, match="layers with experts"):
        read(sign(record(held=(*held, Held(MODEL, experts={7: 1}))), ME), NOW_MS)


@given(st.randoms(use_true_random=False))
def test_any_pattern_of_256_experts_in_58_layers_stays_below_2500_bytes(random: Random) -> None:
    experts = {layer: random.getrandbits(256) | 1 for layer in range(3, 61)}
    grant = grants.sign(Grant(ME.peer, NOW_MS, NOW_MS + 600_000, zone="eu-west-1", owner="an owner"), OPERATOR)
    full = record(
        held=(Held(MODEL, True, range(3, 61), False, True, experts),),
        addresses=("192.168.100.100:17645",),
        zone="eu-west-1",
        network=CLOSED.id,
        grant=grant,
    )
    data = sign(full, ME)
    assert len(data) < 2500
    assert read(data, NOW_MS, CLOSED) == full


@given(st.dictionaries(st.integers(0, 60), st.one_of(masks, st.sampled_from([1, 3, 255, (1 << 256) - 1])), max_size=14))
def test_experts_are_never_said_at_greater_length_than_one_bitset_a_layer(experts: dict[int, int]) -> None:
    naive = sum(12 + (mask.bit_length() + 7) // 8 for mask in experts.values())
    with_them = len(sign(record(held=(Held(MODEL, experts=experts),)), ME))
    without = len(sign(record(held=(Held(MODEL),)), ME))
    assert with_them - without <= naive + 6


def test_a_record_of_another_network_is_refused_before_its_signature_is_looked_at() -> None:
    elsewhere = sign(record(network=open_network("elsewhere").id), ME)
    for data in (elsewhere, sign(record(network=b""), ME), sign(record(network=CLOSED.id), OTHER)):
        with pytest.raises(WrongNetwork):
            read(data, NOW_MS)
    assert read(elsewhere, NOW_MS, open_network("elsewhere")).network == open_network("elsewhere").id


def granted(to: Identity = ME, by: Identity = OPERATOR, **changed: object) -> bytes:
    given_ = replace(Grant(to.peer, NOW_MS - 1000, NOW_MS + 600_000), **changed)
    return grants.sign(given_, by)


def of_closed(grant: bytes, **changed: object) -> bytes:
    return sign(record(network=CLOSED.id, grant=grant, **changed), ME)


def test_in_a_permissioned_network_a_record_needs_a_grant_of_its_own() -> None:
    assert read(of_closed(granted()), NOW_MS, CLOSED).grant == granted()
    for grant, error in (
        (b"", GrantMissing),
        (b"no grant", InvalidGrant),
        (granted(to=OTHER), InvalidGrant),
        (granted(by=OTHER), WrongNetwork),
        (granted(expires_at_ms=NOW_MS), GrantExpired),
        (granted(expires_at_ms=NOW_MS + 599_999), InvalidGrant),
        (granted(zone="another zone"), InvalidGrant),
        (granted(owner="another owner"), InvalidGrant),
        (granted()[:-1] + bytes([granted()[-1] ^ 1]), InvalidSignature),
    ):
        with pytest.raises(error):
            read(of_closed(grant), NOW_MS, CLOSED)
    assert read(of_closed(granted(zone="a zone", owner="an owner")), NOW_MS, CLOSED)


def test_what_the_operator_took_back_is_no_grant_until_it_gives_another() -> None:
    revocations = Revocations().next(ME.peer, NOW_MS)
    with pytest.raises(GrantRevoked):
        read_record(of_closed(granted()), NOW_MS, CLOSED, revocations)
    again = granted(issued_at_ms=NOW_MS + 1)
    assert read_record(of_closed(again), NOW_MS + 1, CLOSED, revocations)


def test_an_offline_record_in_anothers_name_is_forged_and_one_that_never_ends_is_none() -> None:
    """Eight such writes took a Petals swarm down: here each has its refusal."""
    offline = record(held=(), sequence=1 << 62, expires_at_ms=NOW_MS + RECORD_S_MAX * 1000)
    with pytest.raises(InvalidSignature):
        read(sign(offline, OTHER), NOW_MS)
    for years in (1, 100):
        with pytest.raises(InvalidRecord, match="no time, or for more"):
            read(sign(replace(offline, expires_at_ms=NOW_MS + years * 31_536_000_000), ME), NOW_MS)


def test_a_clock_that_is_an_hour_off_is_told_from_the_record() -> None:
    hour_ms = 3_600_000
    ahead = record(issued_at_ms=NOW_MS + hour_ms, expires_at_ms=NOW_MS + 2 * hour_ms)
    behind = record(issued_at_ms=NOW_MS - hour_ms, expires_at_ms=NOW_MS)
    for wrong, error in ((ahead, RecordFromFuture), (behind, RecordExpired)):
        with pytest.raises(error):
            read(sign(wrong, ME), NOW_MS)
