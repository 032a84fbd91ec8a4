"""PROTOCOL.md section 13, the called side: nonces, signatures, tokens, and their limits.  No network."""

from __future__ import annotations

import itertools

import pytest

from node.hello import NONCE_S, TOKEN_S, Caller, Callers
from node.identity import Identity, peer_id, verify
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest, InvalidSignature, Overloaded, Unauthenticated
from protos.ids import PeerId
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    NONCE_BYTES,
    NONCES_MAX,
    TOKEN_BYTES,
    TOKENS_MAX,
    TOKENS_OF_A_PEER_MAX,
)
from protos.transcript import CALLER_DOMAIN, SERVER_DOMAIN, transcript

NOW = 1_800_000_000.0
SHA256 = bytes(range(32))
SERVER, CALLER, OTHER = Identity.create(), Identity.create(), Identity.create()


def counting():
    """Random bytes without chance: 1, 2, 3, ..."""
    numbers = itertools.count(1)
    return lambda length: next(numbers).to_bytes(length, "big")


def callers(sha256: bytes | None = SHA256) -> Callers:
    return Callers(SERVER, sha256, token_bytes=counting())


def greeting(
    challenge: pb.ChallengeReply, caller: Identity = CALLER, sha256: bytes | None = SHA256, now: float = NOW
) -> pb.HelloRequest:
    request = pb.HelloRequest(
        public_key=caller.public_key,
        nonce=b"c" * NONCE_BYTES,
        server_nonce=challenge.nonce,
        time_ms=int(now * 1000),
    )
    request.signature = caller.sign(CALLER_DOMAIN, signed_by_both(request, sha256))
    return request


def signed_by_both(request: pb.HelloRequest, sha256: bytes | None = SHA256) -> bytes:
    return transcript(
        sha256, request.nonce, request.server_nonce, request.time_ms, peer_id(request.public_key), SERVER.peer
    )


def token(known: Callers, caller: Identity = CALLER, now: float = NOW, host: str = "") -> str:
    return known.hello(greeting(known.challenge(now), caller, now=now), now, host).token.hex()


def test_the_transcript_has_these_bytes() -> None:
    got = transcript(bytes(range(32)), b"\x01" * 32, b"\x02" * 32, 1_800_000_000_123, peer_id(b""), peer_id(bytes(32)))
    assert got.hex() == (
        "20000000" + bytes(range(32)).hex()
        + "20000000" + "01" * 32
        + "20000000" + "02" * 32
        + "08000000" + "7b505c18a3010000"
        + "34000000" + peer_id(b"").encode().hex()
        + "34000000" + peer_id(bytes(32)).encode().hex()
    )  # fmt: skip
    plain = transcript(None, b"", b"", 0, peer_id(b""), peer_id(b""))
    assert plain.startswith(b"\x20\0\0\0" + bytes(32) + bytes(8))


def test_hello_proves_both_sides_and_gives_a_token_for_the_caller() -> None:
    known = callers()
    request = greeting(known.challenge(NOW))
    reply = known.hello(request, NOW)
    verify(SERVER.public_key, reply.signature, SERVER_DOMAIN, signed_by_both(request))
    assert (len(reply.token), reply.token_s) == (TOKEN_BYTES, TOKEN_S)
    caller = known.caller(reply.token.hex(), NOW)
    assert (caller.peer, caller.public_key) == (CALLER.peer, CALLER.public_key)


def test_plaintext_has_a_transcript_of_its_own() -> None:
    known = callers(None)
    token_hex = known.hello(greeting(known.challenge(NOW), sha256=None), NOW).token.hex()
    assert known.caller(token_hex, NOW).peer == CALLER.peer
    with pytest.raises(InvalidSignature):
        known.hello(greeting(known.challenge(NOW), sha256=SHA256), NOW)


def test_a_hello_that_was_signed_for_another_certificate_is_refused() -> None:
    known = callers()
    with pytest.raises(InvalidSignature):
        known.hello(greeting(known.challenge(NOW), sha256=b"m" * 32), NOW)


@pytest.mark.parametrize("field", ["public_key", "nonce", "server_nonce", "signature", "time_ms"])
def test_a_forged_field_is_refused(field: str) -> None:
    known = callers()
    request, another = greeting(known.challenge(NOW)), known.challenge(NOW)
    forged = {
        "public_key": OTHER.public_key,
        "nonce": b"x" * NONCE_BYTES,
        "server_nonce": another.nonce,
        "signature": OTHER.sign(CALLER_DOMAIN, signed_by_both(request)),
        "time_ms": request.time_ms + 1,
    }
    setattr(request, field, forged[field])
    with pytest.raises(InvalidSignature):
        known.hello(request, NOW)


def test_the_servers_own_signature_does_not_pass_for_a_callers() -> None:
    known = callers()
    request = greeting(known.challenge(NOW))
    request.signature = CALLER.sign(SERVER_DOMAIN, signed_by_both(request))
    with pytest.raises(InvalidSignature):
        known.hello(request, NOW)


def test_a_nonce_serves_once_even_if_the_first_try_fails() -> None:
    known = callers()
    request = greeting(known.challenge(NOW))
    known.hello(request, NOW)
    with pytest.raises(Unauthenticated):
        known.hello(request, NOW)
    request = greeting(known.challenge(NOW))
    good, request.signature = request.signature, b"x" * 64
    with pytest.raises(InvalidSignature):
        known.hello(request, NOW)
    request.signature = good
    with pytest.raises(Unauthenticated):
        known.hello(request, NOW)


def test_a_nonce_that_was_never_given_or_is_too_old_is_refused() -> None:
    known = callers()
    with pytest.raises(Unauthenticated):
        known.hello(greeting(pb.ChallengeReply(nonce=b"n" * NONCE_BYTES)), NOW)
    challenge = known.challenge(NOW)
    with pytest.raises(Unauthenticated):
        known.hello(greeting(challenge), NOW + NONCE_S)
    challenge = known.challenge(NOW)
    known.hello(greeting(challenge), NOW + NONCE_S - 0.01)


@pytest.mark.parametrize("sign", [1, -1])
def test_clocks_may_differ_by_so_much_and_no_more(sign: int) -> None:
    known = callers()
    known.hello(greeting(known.challenge(NOW), now=NOW + sign * CLOCK_DIFFERENCE_S_MAX), NOW)
    with pytest.raises(InvalidRequest, match="clocks"):
        known.hello(greeting(known.challenge(NOW), now=NOW + sign * (CLOCK_DIFFERENCE_S_MAX + 1)), NOW)


@pytest.mark.parametrize("field", ["public_key", "nonce", "server_nonce", "signature"])
@pytest.mark.parametrize("length", [0, 31, 65, 1 << 20])
def test_a_field_of_another_length_is_refused_before_anything_is_looked_up(field: str, length: int) -> None:
    known = callers()
    request = greeting(known.challenge(NOW))
    good = pb.HelloRequest.FromString(request.SerializeToString())
    setattr(request, field, b"x" * length)
    with pytest.raises(InvalidRequest, match=field):
        known.hello(request, NOW)
    known.hello(good, NOW)


def test_a_token_ends() -> None:
    known = callers()
    token_hex = token(known)
    assert known.caller(token_hex, NOW + TOKEN_S - 0.01).peer == CALLER.peer
    with pytest.raises(Unauthenticated):
        known.caller(token_hex, NOW + TOKEN_S)


@pytest.mark.parametrize("text", ["", "00", "zz", "é", "0" * 63, "f" * 64, "0" * (1 << 20)])
def test_what_is_no_token_is_refused(text: str) -> None:
    known = callers()
    token(known)
    with pytest.raises(Unauthenticated):
        known.caller(text, NOW)


def test_beyond_the_limit_of_nonces_the_oldest_is_forgotten() -> None:
    known = callers()
    challenges = [known.challenge(NOW) for _ in range(NONCES_MAX + 1)]
    with pytest.raises(Unauthenticated):
        known.hello(greeting(challenges[0]), NOW)
    known.hello(greeting(challenges[1]), NOW)
    known.hello(greeting(challenges[-1]), NOW)
    assert len(known._nonces) == NONCES_MAX - 2


def test_beyond_the_limit_of_one_peers_tokens_its_oldest_ends() -> None:
    known = callers()
    of_other = token(known, OTHER)
    tokens = [token(known) for _ in range(TOKENS_OF_A_PEER_MAX + 1)]
    with pytest.raises(Unauthenticated):
        known.caller(tokens[0], NOW)
    for token_hex in (of_other, tokens[1], tokens[-1]):
        known.caller(token_hex, NOW)


def test_a_host_that_fills_the_table_with_identities_keeps_nobody_else_out() -> None:
    known = callers()
    mine = token(known, host="10.0.0.1")
    flood = [
        known._give(Caller(PeerId(f"peer {n}"), b""), NOW + 1, "2001:db8::/64").hex() for n in range(TOKENS_MAX - 1)
    ]
    theirs = token(known, OTHER, host="10.0.0.1")
    with pytest.raises(Unauthenticated):
        known.caller(flood[0], NOW)
    for kept in (mine, theirs, flood[1]):
        known.caller(kept, NOW)
    with pytest.raises(Overloaded, match="most of them of your host"):
        token(known, Identity.create(), host="2001:db8::bad")
    assert len(known._tokens) == TOKENS_MAX


def test_a_full_table_of_tokens_takes_no_newcomer_of_the_host_that_filled_it_and_keeps_who_is_in_it() -> None:
    known = callers()
    mine = token(known)
    for n in range(TOKENS_MAX - 1):
        known._give(Caller(PeerId(f"peer {n}"), b""), NOW + 1)
    with pytest.raises(Overloaded) as refused:
        token(known, OTHER)
    assert refused.value.retry_after_s is not None
    renewed = token(known)
    with pytest.raises(Unauthenticated):
        known.caller(mine, NOW)
    assert known.caller(renewed, NOW).peer == CALLER.peer
    later = NOW + 1 + TOKEN_S
    assert known.caller(token(known, OTHER, later), later).peer == OTHER.peer
    assert len(known._tokens) == len(known._of_peer) == len(known._of_site) == 1
