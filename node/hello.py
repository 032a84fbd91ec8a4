"""Hello, as the node that is called sees it: nonces, tokens, and calls without a token in force refused.

Law: a token is given only for a signature that was made for this connection, this nonce and this time; every call but
Challenge and Hello needs one.  `Callers` is pure but for a lock and randomness.  PROTOCOL.md, section 13.
"""

from __future__ import annotations

import secrets
import threading
import time
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import grpc

from node import address as addresses
from node.identity import Identity, peer_id, verify
from node.refusal import refuse
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest, Overloaded, ShoalError, Unauthenticated
from protos.limits import (
    CLOCK_DIFFERENCE_S_MAX,
    NONCE_BYTES,
    NONCES_MAX,
    PUBLIC_KEY_BYTES,
    SIGNATURE_BYTES,
    TOKEN_BYTES,
    TOKENS_MAX,
    TOKENS_OF_A_PEER_MAX,
)
from protos.transcript import CALLER_DOMAIN, SERVER_DOMAIN, transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.ids import PeerId

K = TypeVar("K")

TOKEN_KEY = "shoal-token"  # noqa: S105  (the name of a metadata key)
TOKEN_S = 600.0
NONCE_S = 30.0

OPEN = frozenset({"/shoal.v1.Peers/Challenge", "/shoal.v1.Peers/Hello"})
"""Calls that need no token: whoever reaches the port may make them."""
_caller: ContextVar[Caller] = ContextVar("caller")


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, proven by Hello."""

    peer: PeerId
    public_key: bytes


@dataclass(frozen=True, slots=True)
class _Token:
    caller: Caller
    site: str
    ends_at: float


class Callers:
    """Those who said Hello.  `now` is in seconds since 1970; equal clocks and randomness give equal replies."""

    def __init__(
        self,
        identity: Identity,
        certificate_sha256: bytes | None,
        *,
        token_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        """`certificate_sha256` None: plaintext."""
        self._identity = identity
        self._certificate_sha256 = certificate_sha256
        self._token_bytes = token_bytes
        self._lock = threading.Lock()
        self._nonces: dict[bytes, float] = {}  # when each ends, the oldest first
        self._tokens: dict[bytes, _Token] = {}  # the oldest first, which is the one that ends first
        # The keys of _tokens, the oldest first: by their caller, and by where that called from.
        self._of_peer: dict[PeerId, dict[bytes, None]] = {}
        self._of_site: dict[str, dict[bytes, None]] = {}

    def challenge(self, now: float) -> pb.ChallengeReply:
        """A nonce for one Hello.  Where too many wait for theirs, the oldest is forgotten."""
        nonce = self._token_bytes(NONCE_BYTES)
        with self._lock:
            _drop_ended(self._nonces, now)
            if len(self._nonces) >= NONCES_MAX:
                del self._nonces[next(iter(self._nonces))]
            self._nonces[nonce] = now + NONCE_S
        return pb.ChallengeReply(nonce=nonce, public_key=self._identity.public_key)

    def hello(self, request: pb.HelloRequest, now: float, host: str = "") -> pb.HelloReply:
        """A token for who signed, at `host`.  The order: lengths, clock, nonce (spent by the attempt), signature, room.

        Raises InvalidRequest, Unauthenticated, InvalidSignature, Overloaded.
        """
        _check_lengths(request)
        _check_clock(request.time_ms, now)
        self._spend(request.server_nonce, now)
        caller = Caller(peer_id(request.public_key), request.public_key)
        signed = transcript(
            self._certificate_sha256,
            request.nonce,
            request.server_nonce,
            request.time_ms,
            caller.peer,
            self._identity.peer,
        )
        verify(caller.public_key, request.signature, CALLER_DOMAIN, signed)
        return pb.HelloReply(
            signature=self._identity.sign(SERVER_DOMAIN, signed),
            token=self._give(caller, now, addresses.site(host)),
            token_s=TOKEN_S,
        )

    def caller(self, token_hex: str, now: float) -> Caller:
        """Whose token this is.  Raises Unauthenticated."""
        try:
            token = self._tokens.get(bytes.fromhex(token_hex))
        except ValueError:
            token = None
        if token is None or token.ends_at <= now:
            raise Unauthenticated(f"this call needs the metadata `{TOKEN_KEY}` with a token in force: say Hello first")
        return token.caller

    def _spend(self, nonce: bytes, now: float) -> None:
        with self._lock:
            ends_at = self._nonces.pop(nonce, None)
        if ends_at is None or ends_at <= now:
            raise Unauthenticated("this Hello answers no challenge of the last seconds: ask for a new one")

    def _give(self, caller: Caller, now: float, site: str = "") -> bytes:
        secret = self._token_bytes(TOKEN_BYTES)
        with self._lock:
            self._make_room(caller.peer, site, now)
            self._tokens[secret] = _Token(caller, site, now + TOKEN_S)
            self._of_peer.setdefault(caller.peer, {})[secret] = None
            self._of_site.setdefault(site, {})[secret] = None
        return secret

    def _make_room(self, peer: PeerId, site: str, now: float) -> None:
        """A peer's own oldest token goes first.  Where all places are taken, identities cost nothing, and hosts do: the
        oldest of the host with most tokens goes, unless that is the newcomer's own."""
        while self._tokens and next(iter(self._tokens.values())).ends_at <= now:
            self._forget(next(iter(self._tokens)))
        own = self._of_peer.get(peer)
        if own and (len(own) >= TOKENS_OF_A_PEER_MAX or len(self._tokens) >= TOKENS_MAX):
            self._forget(next(iter(own)))
        elif len(self._tokens) >= TOKENS_MAX:
            greedy = max(self._of_site.values(), key=len)
            if len(greedy) <= len(self._of_site.get(site, ())):
                raise Overloaded(f"{TOKENS_MAX} tokens are in force here, most of them of your host", retry_after_s=30)
            self._forget(next(iter(greedy)))

    def _forget(self, secret: bytes) -> None:
        token = self._tokens.pop(secret)
        _drop_from(self._of_peer, token.caller.peer, secret)
        _drop_from(self._of_site, token.site, secret)


class Authentication(grpc.ServerInterceptor):
    """Refuses every call without a token in force, and what `permit` refuses; then `caller_of` knows who calls.

    It runs in the server's only polling thread, before anything of the message is read: a look into a table, no more.
    `permit(caller, method)` raises PermissionDenied.
    """

    def __init__(
        self,
        callers: Callers,
        *,
        permit: Callable[[Caller, str], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._callers = callers
        self._permit = permit
        self._clock = clock

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method in OPEN:
            return continuation(details)
        try:
            caller = self._callers.caller(_token_in(details), self._clock())
            if self._permit is not None:
                self._permit(caller, details.method)
        except ShoalError as error:
            return _refusal(error)
        _caller.set(caller)  # gRPC runs the handler in the same context
        return continuation(details)


def caller_of(context: grpc.ServicerContext) -> Caller:
    """Who makes the call whose handler runs in this thread.  Raises Unauthenticated where nobody asked for a token."""
    caller = _caller.get(None)
    if caller is None:
        raise Unauthenticated("nothing here says who calls: the server was started without authentication")
    return caller


def _token_in(details: grpc.HandlerCallDetails) -> str:
    for key, value in details.invocation_metadata or ():
        if key == TOKEN_KEY:
            return value if isinstance(value, str) else ""
    return ""


def _refusal(error: ShoalError) -> grpc.RpcMethodHandler[Any, Any]:
    """As a stream in both directions, whatever was called: so nothing is read, and the refusal waits for nothing."""

    def refused(_: object, context: grpc.ServicerContext) -> NoReturn:
        refuse(context, error)

    return grpc.stream_stream_rpc_method_handler(refused)


def _check_lengths(request: pb.HelloRequest) -> None:
    for name, value, length in (
        ("public_key", request.public_key, PUBLIC_KEY_BYTES),
        ("nonce", request.nonce, NONCE_BYTES),
        ("server_nonce", request.server_nonce, NONCE_BYTES),
        ("signature", request.signature, SIGNATURE_BYTES),
    ):
        if len(value) != length:
            raise InvalidRequest(f"{name} of a Hello has {len(value)} bytes instead of {length}")


def _check_clock(time_ms: int, now: float) -> None:
    apart_s = abs(time_ms / 1000 - now)
    if apart_s > CLOCK_DIFFERENCE_S_MAX:
        raise InvalidRequest(
            f"the clocks of the two nodes are {apart_s:.0f} s apart; at most {CLOCK_DIFFERENCE_S_MAX} s are allowed: "
            "set the one that is wrong"
        )


def _drop_from(index: dict[K, dict[bytes, None]], key: K, secret: bytes) -> None:
    del index[key][secret]
    if not index[key]:
        del index[key]


def _drop_ended(ends_at: dict[bytes, float], now: float) -> None:
    while ends_at and next(iter(ends_at.values())) <= now:
        del ends_at[next(iter(ends_at))]
