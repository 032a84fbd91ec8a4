"""PROTOCOL.md section 15: datagrams, claims and suspicions as bytes, and what bad ones get."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_membership import core

from node import datagram
from node.broadcasts import Broadcasts
from node.claim import Claim, Suspicion, encoded_bytes, peer_hash, sign_claim, sign_suspicion, verify_item
from node.datagram import claim_message, parse_claim, parse_suspicion, suspicion_message
from node.identity import Identity, verify
from node.membership_effect import Send
from node.membership_event import Received, Synced, Tick
from node.message import GOSSIP_ROOM_BYTES, TARGET_BYTES, Ack, Gossip, Message, Nack, Ping, PingRequest
from protos import gossip_pb2 as pb
from protos.errors import BrokenInvariant, InvalidDatagram, InvalidSignature, ShoalError, WrongNetwork, WrongPeer
from protos.limits import DATAGRAM_BYTES_MAX, GOSSIP_ITEMS_MAX, INCARNATION_MAX, LOAD_BYTES_MAX
from protos.transcript import DATAGRAM_DOMAIN

VECTORS: dict[str, Any] = json.loads((Path(__file__).resolve().parent.parent / "vectors" / "gossip.json").read_text())
NETWORK = hashlib.sha256(b"shoal network v1shoal").digest()
INCARNATION = 1_800_000_000_000


def identity(seed: int) -> Identity:
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


ME, OTHER, THIRD = identity(1), identity(2), identity(3)
TO = peer_hash(OTHER.public_key)
CLAIM = sign_claim(ME.sign, NETWORK, ME.public_key, INCARNATION, 7)
FAREWELL = sign_claim(ME.sign, NETWORK, ME.public_key, INCARNATION + 1, 7, left=True)
SUSPICION = sign_suspicion(ME.sign, NETWORK, peer_hash(THIRD.public_key), INCARNATION, ME.public_key)
MESSAGES: dict[str, Message] = {
    "ping": Ping(0x0123456789ABCDEF, (CLAIM, SUSPICION)),
    "ping_request": PingRequest(1, peer_hash(THIRD.public_key), (FAREWELL,)),
    "ack": Ack((1 << 64) - 1),
    "nack": Nack(2),
    "news": Gossip((CLAIM,)),
}


def written(message: Message) -> bytes:
    return datagram.write(message, TO, NETWORK, ME.public_key, ME.sign)


def read(data: bytes) -> datagram.Datagram:
    return datagram.read(data, TO, NETWORK, verify)


def body(**changed: object) -> pb.DatagramBody:
    made = pb.DatagramBody.FromString(pb.Datagram.FromString(written(MESSAGES["ping"])).body)
    for name, value in changed.items():
        made.ClearField(name)
        made.MergeFrom(pb.DatagramBody(**{name: value}))
    return made


def signed(content: pb.DatagramBody | bytes, **changed: bytes) -> bytes:
    encoded = content if isinstance(content, bytes) else content.SerializeToString()
    fields = {"body": encoded, "public_key": ME.public_key, "signature": ME.sign(DATAGRAM_DOMAIN, encoded)} | changed
    return pb.Datagram(**fields).SerializeToString()


# --- golden bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_golden_datagrams_are_written_and_read_to_the_byte(name: str) -> None:
    golden = bytes.fromhex(VECTORS["datagrams"][name])
    assert written(MESSAGES[name]) == golden
    found = read(golden)
    assert found.message == MESSAGES[name]
    assert (found.public_key, found.sender) == (ME.public_key, peer_hash(ME.public_key))


def test_golden_claims_and_suspicions_are_signed_and_parsed_to_the_byte() -> None:
    for name, item in (("claim", CLAIM), ("farewell", FAREWELL)):
        golden = bytes.fromhex(VECTORS[name])
        assert claim_message(item).SerializeToString(deterministic=True) == golden
        assert parse_claim(golden) == item
    golden = bytes.fromhex(VECTORS["suspicion"])
    assert suspicion_message(SUSPICION).SerializeToString(deterministic=True) == golden
    assert parse_suspicion(golden) == SUSPICION


def test_what_is_signed_is_what_the_protocol_lists() -> None:
    """Put together here once more, from the text of section 15 alone."""
    peer, third = (hashlib.sha256(who.public_key).digest() for who in (ME, THIRD))
    number = INCARNATION.to_bytes(8, "little")
    verify(ME.public_key, CLAIM.signature, b"shoal claim v1", NETWORK + peer + number + bytes([7] + [0] * 7) + b"\0")
    verify(ME.public_key, SUSPICION.signature, b"shoal suspicion v1", NETWORK + third + number + peer)


# --- items ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [CLAIM, FAREWELL, SUSPICION], ids=["claim", "farewell", "suspicion"])
def test_an_item_says_nothing_in_another_network_or_with_another_word_changed(item: Claim | Suspicion) -> None:
    verify_item(verify, NETWORK, item)
    changed = [replace(item, incarnation=item.incarnation + 1), replace(item, signature=bytes(64))]
    if isinstance(item, Claim):
        changed += [replace(item, left=not item.left), replace(item, sequence=8)]
        changed += [replace(item, public_key=OTHER.public_key)]
    else:
        changed += [replace(item, subject=TO), replace(item, accuser_key=OTHER.public_key)]
    for wrong in changed:
        with pytest.raises(InvalidSignature):
            verify_item(verify, NETWORK, wrong)
    with pytest.raises(InvalidSignature):
        verify_item(verify, bytes(32), item)


@given(st.integers(0, INCARNATION_MAX), st.integers(0, (1 << 64) - 1), st.booleans())
def test_the_bytes_of_an_item_are_what_they_were_counted_as(incarnation: int, sequence: int, left: bool) -> None:
    claim = Claim(ME.public_key, incarnation, sequence, left, bytes(64))
    suspicion = Suspicion(TO, incarnation, ME.public_key, bytes(64))
    empty = pb.DatagramBody().ByteSize()
    assert pb.DatagramBody(claims=[claim_message(claim)]).ByteSize() - empty == encoded_bytes(claim)
    assert pb.DatagramBody(suspicions=[suspicion_message(suspicion)]).ByteSize() - empty == encoded_bytes(suspicion)


def test_what_is_no_claim_or_suspicion_is_refused() -> None:
    beyond = INCARNATION_MAX + 1
    for claim in (replace(CLAIM, public_key=b"x"), replace(CLAIM, signature=b"x"), replace(CLAIM, incarnation=beyond)):
        with pytest.raises(InvalidDatagram):
            parse_claim(claim_message(claim).SerializeToString())
    for suspicion in (
        replace(SUSPICION, subject=b"x"),
        replace(SUSPICION, accuser_key=b"x"),
        replace(SUSPICION, signature=b"x"),
        replace(SUSPICION, incarnation=beyond),
    ):
        with pytest.raises(InvalidDatagram):
            parse_suspicion(suspicion_message(suspicion).SerializeToString())
    for parse in (parse_claim, parse_suspicion):
        with pytest.raises(InvalidDatagram):
            parse(b"\xff")


# --- checks, in their order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "data", "error"),
    [
        ("too large", bytes(DATAGRAM_BYTES_MAX + 1), InvalidDatagram),
        ("empty", b"", InvalidDatagram),
        ("no protobuf", b"\xff\xff\xff", InvalidDatagram),
        ("a body that is none", signed(b"\xff\xff\xff"), InvalidDatagram),
        ("a short key", signed(body(), public_key=bytes(31)), InvalidDatagram),
        ("a long signature", signed(body(), signature=bytes(65)), InvalidDatagram),
        ("no network", signed(body(network=b"")), InvalidDatagram),
        ("no receiver", signed(body(to=b"")), InvalidDatagram),
        ("an unknown kind", signed(body(kind=77)), InvalidDatagram),
        ("no kind", signed(body(kind=0)), InvalidDatagram),
        ("a target where none belongs", signed(body(target=bytes(32))), InvalidDatagram),
        ("a request without target", signed(body(kind=pb.GOSSIP_KIND_PING_REQUEST)), InvalidDatagram),
        ("news with a nonce", signed(body(kind=pb.GOSSIP_KIND_NEWS)), InvalidDatagram),
        ("a claim of no key", signed(body(claims=[pb.Claim()])), InvalidDatagram),
        ("a suspicion of nobody", signed(body(suspicions=[pb.Suspicion()])), InvalidDatagram),
        ("another network", signed(body(network=bytes(32))), WrongNetwork),
        ("another receiver", signed(body(to=bytes(32))), WrongPeer),
        ("a signature of another", signed(body(), public_key=OTHER.public_key), InvalidSignature),
        ("a signature of another use", signed(body(), signature=ME.sign(b"other", b"")), InvalidSignature),
    ],
)
def test_a_bad_datagram_has_a_named_outcome(what: str, data: bytes, error: type[ShoalError]) -> None:
    with pytest.raises(error):
        read(data)


def test_too_many_items_are_refused() -> None:
    small = pb.Claim(public_key=ME.public_key, signature=bytes(64))
    many = body(claims=[small] * (GOSSIP_ITEMS_MAX + 1), suspicions=[])
    with pytest.raises(InvalidDatagram, match="claims and suspicions"):
        read(signed(many))
    assert len(read(signed(body(claims=[small] * GOSSIP_ITEMS_MAX, suspicions=[]))).message.gossip) == GOSSIP_ITEMS_MAX


def test_the_signature_is_looked_at_last() -> None:
    def never(*_: object) -> None:
        raise AssertionError("the signature was looked at")

    for wrong in (body(network=bytes(32)), body(to=bytes(32)), body(kind=77), body(claims=[pb.Claim()])):
        with pytest.raises((InvalidDatagram, WrongNetwork, WrongPeer)):
            datagram.read(signed(wrong), TO, NETWORK, never)


# --- size ----------------------------------------------------------------------------------------------------------


def test_a_message_holds_as_many_items_as_fit_and_reaches_the_limit() -> None:
    """Suspicions and farewells of all sizes: what the queue gives always fits, and no smaller item would have."""
    largest = 0
    for count in range(1, 40):
        queue = Broadcasts(100)
        for number in range(count):
            queue.add(Suspicion(peer_hash(bytes([number])), 1 << (7 * number) % 63, ME.public_key, bytes(64)))
        gossip = tuple(queue.take(GOSSIP_ROOM_BYTES - TARGET_BYTES, GOSSIP_ITEMS_MAX, 9, 4))
        data = written(PingRequest(1, TO, gossip))
        assert len(data) <= DATAGRAM_BYTES_MAX
        assert len(data) == DATAGRAM_BYTES_MAX - GOSSIP_ROOM_BYTES + TARGET_BYTES + sum(map(encoded_bytes, gossip))
        largest = max(largest, len(data))
    exact = Claim(ME.public_key, 1 << 62, 0, False, bytes(64))
    sizes = [encoded_bytes(replace(SUSPICION, incarnation=1 << bits)) for bits in range(1, 63, 7)]
    assert largest > DATAGRAM_BYTES_MAX - max(sizes) - encoded_bytes(exact) // 4


def test_a_datagram_of_exactly_the_limit_is_read_and_one_byte_more_is_refused() -> None:
    plain = signed(body(kind=pb.GOSSIP_KIND_PING)).__len__()
    for extra in (DATAGRAM_BYTES_MAX - plain - 2, DATAGRAM_BYTES_MAX - plain - 1):
        padded = body().SerializeToString() + b"\x7a" + varint(extra - 1) + bytes(extra - 1)  # a field that is unknown
        data = signed(padded)
        if len(data) <= DATAGRAM_BYTES_MAX:
            assert read(data).message == MESSAGES["ping"]
        else:
            with pytest.raises(InvalidDatagram):
                read(data)


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80, number >> 7])


def test_a_load_report_rides_where_there_is_room_and_is_left_out_where_there_is_none() -> None:
    load = bytes(range(256)) + bytes(74)  # as long as one with the hottest experts
    few, many = Ping(1, (CLAIM, SUSPICION)), Ping(1, (CLAIM,) * GOSSIP_ITEMS_MAX)
    for message, rides in ((few, True), (many, False)):
        data = datagram.write(message, TO, NETWORK, ME.public_key, ME.sign, load)
        assert len(data) <= DATAGRAM_BYTES_MAX
        assert read(data) == datagram.Datagram(ME.public_key, peer_hash(ME.public_key), message, load if rides else b"")
    assert read(written(few)).load == b""


def test_a_load_report_fills_a_datagram_to_the_last_byte() -> None:
    message = Ping((1 << 64) - 1, (CLAIM,) * 6)
    sizes = {}
    for length in range(100, LOAD_BYTES_MAX + 1):
        data = datagram.write(message, TO, NETWORK, ME.public_key, ME.sign, bytes(length))
        sizes[len(read(data).load)] = len(data)
    assert DATAGRAM_BYTES_MAX - 2 <= max(sizes.values()) <= DATAGRAM_BYTES_MAX
    assert 0 in sizes, "beyond it there is none"


def test_a_load_report_may_have_so_many_bytes_and_no_more() -> None:
    content = body(claims=[], suspicions=[])
    content.load = bytes(LOAD_BYTES_MAX)
    assert read(signed(content)).load == bytes(LOAD_BYTES_MAX)
    content.load = bytes(LOAD_BYTES_MAX + 1)
    with pytest.raises(InvalidDatagram, match="load report"):
        read(signed(content))


def test_more_gossip_than_fits_is_our_own_bug() -> None:
    with pytest.raises(BrokenInvariant):
        written(Gossip((SUSPICION,) * 9))


def test_whatever_membership_sends_can_be_written() -> None:
    node = core(0, incarnation=INCARNATION_MAX - 1)
    keys = [identity(seed) for seed in range(4, 60)]
    claims = tuple(Claim(who.public_key, INCARNATION_MAX, 1 << 63, False, bytes(64)) for who in keys)
    node._verified._verify = lambda *_: None
    node.handle(Synced(claims[0].peer, claims), 0.0)
    accused = tuple(Suspicion(claim.peer, INCARNATION_MAX, keys[0].public_key, bytes(64)) for claim in claims[1:])
    for start in range(0, 48, 8):
        node.handle(Received(claims[0].peer, Gossip(accused[start : start + 8])), 0.0)
    sent = []
    while node.deadline is not None and node.deadline < 5:
        sent += [effect for effect in node.handle(Tick(), node.deadline) if isinstance(effect, Send)]
    sizes = [len(written(send.message)) for send in sent]
    assert DATAGRAM_BYTES_MAX - 100 < max(sizes) <= DATAGRAM_BYTES_MAX


# --- fuzzing -------------------------------------------------------------------------------------------------------

hashes = st.binary(min_size=32, max_size=32)
incarnations = st.integers(0, INCARNATION_MAX)
claims = st.builds(
    Claim, hashes, incarnations, st.integers(0, (1 << 64) - 1), st.booleans(), st.binary(min_size=64, max_size=64)
)
suspicions = st.builds(Suspicion, hashes, incarnations, hashes, st.binary(min_size=64, max_size=64))
gossips = st.tuples(st.lists(claims, max_size=3), st.lists(suspicions, max_size=3)).map(lambda two: (*two[0], *two[1]))
nonces = st.integers(0, (1 << 64) - 1)
messages = st.one_of(
    st.builds(Ping, nonces, gossips),
    st.builds(PingRequest, nonces, hashes, gossips),
    st.builds(Ack, nonces, gossips),
    st.builds(Nack, nonces, gossips),
    st.builds(Gossip, gossips),
)


@given(messages)
def test_any_message_comes_back_as_it_was(message: Message) -> None:
    assert read(written(message)).message == message


@settings(max_examples=500)
@given(st.binary(max_size=DATAGRAM_BYTES_MAX + 10))
def test_random_bytes_have_a_typed_outcome(data: bytes) -> None:
    with pytest.raises((InvalidDatagram, WrongNetwork, WrongPeer, InvalidSignature)):
        read(data)


@given(st.binary(max_size=300))
def test_a_random_body_that_is_signed_has_a_typed_outcome(data: bytes) -> None:
    with pytest.raises((InvalidDatagram, WrongNetwork, WrongPeer)):
        read(signed(data))


@given(messages, st.data())
def test_a_truncated_datagram_is_refused(message: Message, data: st.DataObject) -> None:
    whole = written(message)
    with pytest.raises((InvalidDatagram, InvalidSignature)):
        read(whole[: data.draw(st.integers(0, len(whole) - 1))])


@settings(max_examples=150)
@given(messages, st.data())
def test_a_flipped_bit_is_refused_or_makes_no_difference(message: Message, data: st.DataObject) -> None:
    whole = bytearray(written(message))
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    try:
        found = read(bytes(whole))
    except (InvalidDatagram, WrongNetwork, WrongPeer, InvalidSignature):
        return
    assert found.message == message
