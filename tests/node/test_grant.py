"""PROTOCOL.md section 16: what an operator gives, takes back and names."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import grant as grants
from node import model_name, operator_signed, revocations
from node.grant import Grant
from node.identity import Identity, peer_bytes, peer_of
from node.model_name import ModelName
from node.network import permissioned
from node.revocations import Newer, Older, RevocationList, Revocations, Same
from protos import peers_pb2 as pb
from protos.errors import (
    Equivocation,
    GrantExpired,
    GrantRevoked,
    InvalidGrant,
    InvalidSignature,
    WrongNetwork,
)
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    GRANT_BYTES_MAX,
    GRANT_S_MAX,
    MODEL_NAME_BYTES_MAX,
    NAME_CHARS_MAX,
    REVOCATIONS_BYTES_MAX,
    REVOCATIONS_MAX,
)
from protos.transcript import GRANT_DOMAIN, MODEL_NAME_DOMAIN, REVOCATIONS_DOMAIN

NOW_MS = 1_800_000_000_000
OPERATOR, OTHER, PEER = Identity.create(), Identity.create(), Identity.create()
NETWORK = permissioned(OPERATOR.public_key)
GRANT = Grant(PEER.peer, NOW_MS, NOW_MS + 86_400_000, "a zone", "an owner")
LIST = Revocations(3, NOW_MS, {PEER.peer: NOW_MS, OTHER.peer: 7})
NAME = ModelName("mixtral", "ab" * 32, NOW_MS)


def written(content: bytes, domain: bytes, by: Identity = OPERATOR) -> bytes:
    return operator_signed.write(content, domain, by)


def tampered(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def test_what_was_granted_is_read() -> None:
    data = grants.sign(GRANT, OPERATOR)
    assert grants.read(data, NETWORK, NOW_MS) == grants.read(data, None, NOW_MS) == GRANT
    assert operator_signed.network_of(data) == NETWORK
    assert len(data) < 200


def test_a_grant_is_the_operators_alone() -> None:
    with pytest.raises(WrongNetwork):
        grants.read(grants.sign(GRANT, OTHER), NETWORK, NOW_MS)
    with pytest.raises(InvalidSignature):
        grants.read(tampered(grants.sign(GRANT, OPERATOR)), NETWORK, NOW_MS)
    content = pb.OperatorSigned.FromString(grants.sign(GRANT, OPERATOR)).content
    with pytest.raises(InvalidSignature):
        grants.read(written(content, REVOCATIONS_DOMAIN), NETWORK, NOW_MS)


def test_a_grant_ends() -> None:
    data = grants.sign(GRANT, OPERATOR)
    grants.read(data, NETWORK, GRANT.expires_at_ms - 1)
    with pytest.raises(GrantExpired, match="give another"):
        grants.read(data, NETWORK, GRANT.expires_at_ms)


def test_a_grant_of_the_future_is_none_beyond_the_difference_of_clocks() -> None:
    data = grants.sign(GRANT, OPERATOR)
    grants.read(data, NETWORK, NOW_MS - CLOCK_DIFFERENCE_S_MAX * 1000)
    with pytest.raises(InvalidGrant, match="clock"):
        grants.read(data, NETWORK, NOW_MS - CLOCK_DIFFERENCE_S_MAX * 1000 - 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"expires_at_ms": NOW_MS},
        {"expires_at_ms": NOW_MS + GRANT_S_MAX * 1000 + 1},
        {"issued_at_ms": 0},
        {"zone": "z" * (NAME_CHARS_MAX + 1)},
        {"owner": "\x1b[2J"},
    ],
)
def test_a_grant_that_nobody_would_take_is_not_signed_and_not_read(changed: dict[str, object]) -> None:
    with pytest.raises(InvalidGrant):
        grants.sign(replace(GRANT, **changed), OPERATOR)
    message = pb.Grant(
        peer=peer_bytes(PEER.peer), issued_at_ms=NOW_MS, expires_at_ms=NOW_MS + 9, zone=GRANT.zone, owner=GRANT.owner
    )
    for name, value in changed.items():
        setattr(message, name, value)
    with pytest.raises(InvalidGrant):
        grants.read(written(message.SerializeToString(), GRANT_DOMAIN), NETWORK, NOW_MS)


def test_the_longest_grant_and_the_longest_name_fit_their_limits() -> None:
    wide = "\U0001f41f" * NAME_CHARS_MAX
    longest = replace(GRANT, zone=wide, owner=wide, expires_at_ms=NOW_MS + GRANT_S_MAX * 1000)
    data = grants.sign(longest, OPERATOR)
    assert len(data) <= GRANT_BYTES_MAX
    assert grants.read(data, NETWORK, NOW_MS) == longest
    with pytest.raises(InvalidGrant, match="bytes"):
        grants.read(bytes(GRANT_BYTES_MAX + 1), NETWORK, NOW_MS)
    named = model_name.sign(replace(NAME, name=wide), OPERATOR)
    assert len(named) <= MODEL_NAME_BYTES_MAX
    with pytest.raises(InvalidGrant, match="bytes"):
        model_name.read(bytes(MODEL_NAME_BYTES_MAX + 1), NETWORK)


def test_what_was_revoked_is_read() -> None:
    data = revocations.sign(LIST, OPERATOR)
    assert revocations.read(data, NETWORK, NOW_MS) == LIST
    with pytest.raises(GrantRevoked):
        LIST.check(GRANT)
    LIST.check(replace(GRANT, issued_at_ms=NOW_MS + 1))
    LIST.check(replace(GRANT, peer=OPERATOR.peer))


def test_the_next_list_has_one_more_and_leaves_out_what_has_expired_anyway() -> None:
    later_ms = 8 + GRANT_S_MAX * 1000
    following = LIST.next(OPERATOR.peer, later_ms)
    assert following.version == 4
    assert set(following.at_ms) == {PEER.peer, OPERATOR.peer}


def test_a_list_is_monotone() -> None:
    known = RevocationList(NETWORK)
    assert known.signed == b""
    third = revocations.sign(LIST, OPERATOR)
    assert known.merge(third, NOW_MS) == Newer(LIST)
    assert known.merge(third, NOW_MS) == Same()
    assert known.merge(third + b"\xfa\x7f\x01!", NOW_MS) == Same()
    assert known.merge(revocations.sign(replace(LIST, version=2), OPERATOR), NOW_MS) == Older(2)
    with pytest.raises(Equivocation):
        known.merge(revocations.sign(replace(LIST, at_ms={}), OPERATOR), NOW_MS)
    assert known.signed == third
    fourth = LIST.next(OPERATOR.peer, NOW_MS)
    assert known.merge(revocations.sign(fourth, OPERATOR), NOW_MS) == Newer(fourth)
    assert known.revocations == fourth


def test_a_list_of_another_operator_changes_nothing() -> None:
    known = RevocationList(NETWORK)
    with pytest.raises(WrongNetwork):
        known.merge(revocations.sign(LIST, OTHER), NOW_MS)
    with pytest.raises(InvalidSignature):
        known.merge(tampered(revocations.sign(LIST, OPERATOR)), NOW_MS)
    assert known.revocations == Revocations()


def test_the_longest_list_fits_and_one_more_does_not() -> None:
    many = {peer_of(n.to_bytes(32, "big")): NOW_MS for n in range(REVOCATIONS_MAX)}
    longest = Revocations(1, NOW_MS, many)
    data = revocations.sign(longest, OPERATOR)
    assert len(data) <= REVOCATIONS_BYTES_MAX
    assert revocations.read(data, NETWORK, NOW_MS) == longest
    with pytest.raises(InvalidGrant, match="at most"):
        revocations.sign(longest.next(PEER.peer, NOW_MS), OPERATOR)
    with pytest.raises(InvalidGrant, match="bytes"):
        revocations.read(bytes(REVOCATIONS_BYTES_MAX + 1), NETWORK, NOW_MS)


def entries(*peers: bytes, version: int = 1, issued_at_ms: int = NOW_MS) -> bytes:
    made = pb.Revocations(
        version=version, issued_at_ms=issued_at_ms, revocations=[pb.Revocation(peer=peer) for peer in peers]
    )
    return written(made.SerializeToString(), REVOCATIONS_DOMAIN)


@pytest.mark.parametrize(
    "wrong",
    [
        entries(b"a" * 32, version=0),
        entries(b"b" * 32, b"a" * 32),
        entries(b"a" * 32, b"a" * 32),
        entries(b"a" * 31),
        entries(issued_at_ms=NOW_MS + CLOCK_DIFFERENCE_S_MAX * 1000 + 1),
    ],
)
def test_a_list_that_cannot_be_is_refused(wrong: bytes) -> None:
    with pytest.raises(InvalidGrant):
        revocations.read(wrong, NETWORK, NOW_MS)


def test_a_models_name_is_read() -> None:
    data = model_name.sign(NAME, OPERATOR)
    assert model_name.read(data, NETWORK) == model_name.read(data, None) == NAME
    with pytest.raises(WrongNetwork):
        model_name.read(model_name.sign(NAME, OTHER), NETWORK)


@pytest.mark.parametrize("changed", [{"name": " "}, {"name": "\x07"}, {"model_id": "AB" * 32}, {"issued_at_ms": 0}])
def test_a_name_that_nobody_would_take_is_not_signed_and_not_read(changed: dict[str, object]) -> None:
    wrong = replace(NAME, **changed)
    with pytest.raises(InvalidGrant):
        model_name.sign(wrong, OPERATOR)
    message = pb.ModelName(name=wrong.name, model_id=wrong.model_id, issued_at_ms=wrong.issued_at_ms)
    with pytest.raises(InvalidGrant):
        model_name.read(written(message.SerializeToString(), MODEL_NAME_DOMAIN), NETWORK)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_typed_error_or_what_the_operator_signed(content: bytes) -> None:
    readers = (
        (GRANT_DOMAIN, lambda data: grants.read(data, NETWORK, NOW_MS)),
        (REVOCATIONS_DOMAIN, lambda data: revocations.read(data, NETWORK, NOW_MS)),
        (MODEL_NAME_DOMAIN, lambda data: model_name.read(data, NETWORK)),
    )
    for domain, read in readers:
        with pytest.raises((InvalidGrant, InvalidSignature, WrongNetwork)):
            read(content)
        with contextlib.suppress(InvalidGrant):  # `08 01` is a list: version 1, and nobody on it
            read(written(content, domain))


def test_what_nobody_signed_is_of_no_network() -> None:
    with pytest.raises(InvalidGrant):
        operator_signed.network_of(b"\xff")
