"""Links: this node's connections to others, each proven by Hello and cut into lanes.  PROTOCOL.md, section 13.

Law: no call leaves without a pinned certificate and a token, or by the explicit word `plaintext`; nothing here waits
without a deadline.  Blocking and thread-safe: for threads, never in trio's.
"""

from __future__ import annotations

import contextlib
import enum
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeVar

import grpc

from node import address as addresses
from node import certificate, status
from node.hello import TOKEN_KEY
from node.identity import peer_id, verify
from protos import peers_pb2 as pb
from protos.errors import InvalidRequest, Overloaded, PeerLost, ShoalError, Unauthenticated, Unavailable, WrongPeer
from protos.limits import (
    EXPERT_MESSAGE_BYTES_MAX,
    INFERENCE_MESSAGE_BYTES_MAX,
    NONCE_BYTES,
    PEERS_MESSAGE_BYTES_MAX,
    PUBLIC_KEY_BYTES,
    STAGE_MESSAGE_BYTES_MAX,
    TOKEN_BYTES,
)
from protos.peers_pb2_grpc import PeersStub
from protos.transcript import CALLER_DOMAIN, SERVER_DOMAIN, transcript

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.identity import Identity
    from protos.ids import PeerId

Q = TypeVar("Q")
R = TypeVar("R")

HELLO_S = 5.0
"""For first contact, and for a renewal: a connection, a handshake and two calls."""

LINKS_MAX: Final = 1024
"""Peers that this node is linked to at once: far fewer than it knows, since each costs connections."""

RETIRED_MAX: Final = 64
"""Links that were replaced and are not closed yet."""
_RETIRED_S = 20.0

# After a failed Hello others that wait for the same link fail with it, instead of trying one after another.
_RETRY_S = 0.5

# A peer that froze is noticed within 10 s even where nobody waits with a deadline.
_KEEPALIVE_TIME_MS = 5_000
_KEEPALIVE_TIMEOUT_MS = 5_000

CHANNEL_OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.enable_http_proxy", 0),  # a node is asked itself, not whatever answers in its place
    ("grpc.use_local_subchannel_pool", 1),  # or all lanes to one address would share one connection
    ("grpc.keepalive_time_ms", _KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),  # or a minute: the one above does not end every ping
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A peer that comes back is reached within about a second; the least is also how long one attempt may take.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 5_000),
]

SERVER_OPTIONS: Final[list[tuple[str, Any]]] = [
    ("grpc.so_reuseport", 0),  # or two nodes would share a port, and each get half of the calls
    # Of any message, as gRPC takes it in; node.intake holds each service to its own limit before it parses.
    ("grpc.max_receive_message_length", STAGE_MESSAGE_BYTES_MAX),
    # Callers ping as often as CHANNEL_OPTIONS says, also between calls; less than that is no misuse.
    ("grpc.http2.min_ping_interval_without_data_ms", _KEEPALIVE_TIME_MS // 2),
    # A caller's host that vanished without a word is noticed, and what it held here is freed.
    ("grpc.keepalive_time_ms", 2 * _KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.ping_timeout_ms", _KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
]


def server_credentials(own: certificate.Certificate) -> grpc.ServerCredentials:
    """For `add_secure_port`.  Callers show no certificate: Hello proves who they are."""
    return grpc.ssl_server_credentials([(own.key_pem, own.pem)])


class Lane(enum.Enum):
    """Each has a connection of its own, so that none waits behind another's bytes."""

    CONTROL = "control"
    STEPS = "steps"
    EXPERTS = "experts"
    BULK = "bulk"
    CLIENTS = "clients"


REPLY_BYTES_MAX: Final = {
    Lane.CONTROL: PEERS_MESSAGE_BYTES_MAX,
    Lane.STEPS: STAGE_MESSAGE_BYTES_MAX,
    Lane.EXPERTS: EXPERT_MESSAGE_BYTES_MAX,
    Lane.BULK: STAGE_MESSAGE_BYTES_MAX,
    Lane.CLIENTS: INFERENCE_MESSAGE_BYTES_MAX,
}
"""What a lane takes in; gRPC refuses more when it has read the length."""


@dataclass(frozen=True, slots=True)
class Pin:
    """The certificate that a peer must show.  `sha256` is of its DER bytes."""

    pem: bytes
    sha256: bytes


@dataclass(frozen=True, slots=True)
class _Token:
    metadata: tuple[tuple[str, str], ...]
    renew_at: float
    ends_at: float


class Link:
    """Connections to one peer at one address.  A peer that restarts has another certificate, and needs another link."""

    def __init__(
        self,
        identity: Identity,
        address: str,
        pin: Pin | None,
        *,
        peer: PeerId | None = None,
        hello_s: float = HELLO_S,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`pin` None: plaintext.  `peer` None: whoever proves a key in the first Hello.  Connects to nobody yet."""
        self.address = address
        self.pin = pin
        self._identity = identity
        self._peer = peer
        self._hello_s = hello_s
        self._clock = clock
        self._wall = wall
        self._channels: dict[Lane, grpc.Channel] = {}
        self._channels_lock = threading.Lock()
        self._closed = False
        self._token: _Token | None = None
        self._hello_lock = threading.Lock()
        self._last_failure: tuple[float, ShoalError] | None = None

    @property
    def peer(self) -> PeerId:
        """Who answers there.  Known from the beginning, or from the first Hello on."""
        assert self._peer is not None, "a link without a peer has not said Hello"
        return self._peer

    def channel(self, lane: Lane) -> grpc.Channel:
        """The lane's, made on first use.  Raises PeerLost if the link was closed: ask Links for the peer's new one."""
        with self._channels_lock:
            if self._closed:
                raise PeerLost(f"the link to the node at {self.address} is closed")
            if lane not in self._channels:
                self._channels[lane] = _open(self.address, self.pin, lane)
            return self._channels[lane]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The token, for a call's `metadata`.  Says Hello if there is none in force, and at half its life.

        Raises PeerLost, WrongPeer, InvalidSignature, DeadlineExceeded, and what the peer refuses with.
        """
        token = self._token
        if token is not None and self._clock() < token.renew_at:
            return token.metadata
        with self._hello_lock:
            return self._renewed().metadata

    def renew(self) -> None:
        """Forgets the token: the peer did not take it (UNAUTHENTICATED)."""
        self._token = None

    def call(
        self,
        method: Callable[[grpc.Channel], grpc.UnaryUnaryMultiCallable[Q, R]],
        request: Q,
        *,
        timeout_s: float,
        lane: Lane = Lane.CONTROL,
    ) -> R:
        """A unary call; a token that the peer has forgotten is renewed once.  Raises typed errors.

        `method` picks it from a channel: `lambda channel: PeersStub(channel).Sync`.
        """
        try:
            return self._call(method, request, timeout_s, lane)
        except Unauthenticated:
            self.renew()
            return self._call(method, request, timeout_s, lane)

    def close(self) -> None:
        """Ends every call that runs."""
        with self._channels_lock:
            self._closed = True
            channels = list(self._channels.values())
            self._channels.clear()
        for channel in channels:
            channel.close()

    def _call(
        self,
        method: Callable[[grpc.Channel], grpc.UnaryUnaryMultiCallable[Q, R]],
        request: Q,
        timeout_s: float,
        lane: Lane,
    ) -> R:
        metadata = self.metadata()
        with _typed(self.address):
            return method(self.channel(lane))(request, timeout=timeout_s, metadata=metadata)

    def _renewed(self) -> _Token:
        """Under the lock: another thread may have done it meanwhile, or have failed just now."""
        token, now = self._token, self._clock()
        if token is not None and now < token.renew_at:
            return token
        usable = token if token is not None and now < token.ends_at else None
        if self._last_failure is not None and now < self._last_failure[0] + _RETRY_S:
            if usable is not None:
                return usable
            raise self._last_failure[1]
        try:
            self._token = self._hello(now)
        except ShoalError as error:
            self._last_failure = (self._clock(), error)
            if usable is None or not isinstance(error, Unavailable):
                raise
            return usable
        self._last_failure = None
        return self._token

    def _hello(self, now: float) -> _Token:
        """Challenge and Hello: proves this node to the peer and the peer to this node, on this connection."""
        with _typed(self.address):
            stub = PeersStub(self.channel(Lane.CONTROL))
            challenge = stub.Challenge(pb.ChallengeRequest(), timeout=self._hello_s)
            server = self._expected(challenge)
            request = pb.HelloRequest(
                public_key=self._identity.public_key,
                nonce=secrets.token_bytes(NONCE_BYTES),
                server_nonce=challenge.nonce,
                time_ms=int(self._wall() * 1000),
            )
            signed = transcript(
                self.pin.sha256 if self.pin else None,
                request.nonce,
                request.server_nonce,
                request.time_ms,
                self._identity.peer,
                server,
            )
            request.signature = self._identity.sign(CALLER_DOMAIN, signed)
            reply = stub.Hello(request, timeout=self._hello_s)
        verify(challenge.public_key, reply.signature, SERVER_DOMAIN, signed)
        if len(reply.token) != TOKEN_BYTES or not reply.token_s > 0:
            raise InvalidRequest(f"the node at {self.address} answered a Hello with no token")
        self._peer = server
        return _Token(((TOKEN_KEY, reply.token.hex()),), now + reply.token_s / 2, now + reply.token_s)

    def _expected(self, challenge: pb.ChallengeReply) -> PeerId:
        if len(challenge.public_key) != PUBLIC_KEY_BYTES or len(challenge.nonce) != NONCE_BYTES:
            raise InvalidRequest(f"the node at {self.address} answered a Challenge with no key or no nonce")
        server = peer_id(challenge.public_key)
        if self._peer not in (None, server):
            raise WrongPeer(f"at {self.address} answers {server[:8]}, not {self.peer[:8]}: is the address right?")
        return server


def connect(
    identity: Identity,
    address: str,
    *,
    plaintext: bool = False,
    certificate_sha256: bytes | None = None,
    peer: PeerId | None = None,
    timeout_s: float = HELLO_S,
) -> Link:
    """First contact with `host:port[#PEERID]`: fetches the certificate, pins it, and says Hello over it.

    `certificate_sha256` and `peer`: what must be found there, where the caller knows.  Takes at most about three times
    `timeout_s`.  Raises PeerLost, DeadlineExceeded, WrongPeer, InvalidSignature, InvalidRequest.
    """
    target = addresses.parse(address)
    if None not in (peer, target.peer) and peer != target.peer:
        raise WrongPeer(f"{address} does not name {str(peer)[:8]}, who is wanted")
    pin = None if plaintext else _pinned(target.host_port, certificate_sha256, timeout_s)
    link = Link(identity, target.host_port, pin, peer=peer or target.peer, hello_s=timeout_s)
    try:
        link.metadata()
    except BaseException:
        link.close()
        raise
    return link


@dataclass(frozen=True, slots=True)
class _Place:
    """What a peer's record says."""

    address: str
    certificate_sha256: bytes | None


class _Slot:
    """One peer's link, and what it was made for."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.place: _Place | None = None
        self.link: Link | None = None
        self.last_failure: tuple[float, ShoalError] | None = None


class Links:
    """One link a peer, made on first use from what its record says, and made again when the record says otherwise.

    A certificate that is newer than the record (the peer restarted a moment ago) is taken: Hello proves the key over
    it, which is as good as the record's signature.  `known_only`: to nobody else are links made, whatever address
    others give; for a permissioned network, where a record stands for a grant.
    """

    def __init__(
        self, identity: Identity, *, plaintext: bool = False, timeout_s: float = HELLO_S, known_only: bool = False
    ) -> None:
        self.plaintext = plaintext
        self._known_only = known_only
        self.timeout_s = timeout_s
        self._identity = identity
        self._lock = threading.Lock()
        self._places: dict[PeerId, _Place] = {}
        self._slots: dict[PeerId, _Slot] = {}
        self._retired: deque[tuple[float, Link]] = deque()
        self._closed = False

    def learn(self, peer: PeerId, address: str, certificate_sha256: bytes | None) -> None:
        """What the peer's newest record says.  Connects to nobody."""
        with self._lock:
            self._places[peer] = _Place(address, certificate_sha256)

    def to(self, peer: PeerId, address: str = "") -> Link:
        """The peer's link, proven by Hello when it is made.  `address`: where it may be, if no record of it is known.

        Raises PeerLost, DeadlineExceeded, WrongPeer, InvalidSignature.
        """
        with self._lock:
            if self._closed:
                raise PeerLost("this node is leaving, and connects to nobody")
            slot = self._slots.get(peer)
            given = _Place(address, None) if address and self._may_be_anywhere(peer) else None
            place = self._places.get(peer) or given
            if slot is not None and slot.link is not None and place in (slot.place, None):
                return slot.link
            if place is None:
                raise PeerLost(f"no address of the peer {peer[:8]} is known")
            if slot is None:
                slot = self._new_slot(peer)
        return self._made(peer, slot, place)

    def check(self, peer: PeerId, timeout_s: float) -> bool:
        """After a failure: if the peer shows another certificate now (it restarted), its link is dropped.

        True: it was dropped, and the next one will be new.  Raises PeerLost where nobody answers.
        """
        with self._lock:
            slot = self._slots.get(peer)
        link = slot.link if slot else None
        if slot is None or link is None or link.pin is None:
            return False
        if certificate.fetch(link.address, timeout_s)[1] == link.pin.sha256:
            return False
        with slot.lock:
            if slot.link is link:
                slot.link = slot.place = None
        self._retire(link)
        return True

    def forget(self, peer: PeerId) -> None:
        """Closes the link; what its record said is forgotten too."""
        with self._lock:
            self._places.pop(peer, None)
            slot = self._slots.pop(peer, None)
        if slot is not None and slot.link is not None:
            slot.link.close()

    def close(self) -> None:
        """Ends every call over every link; no new ones are made."""
        with self._lock:
            self._closed = True
            links = [slot.link for slot in self._slots.values()] + [link for _, link in self._retired]
            self._slots.clear()
            self._retired.clear()
            self._places.clear()
        for link in links:
            if link is not None:
                link.close()

    def _may_be_anywhere(self, peer: PeerId) -> bool:
        return not self._known_only or peer == self._identity.peer

    def _new_slot(self, peer: PeerId) -> _Slot:
        if len(self._slots) >= LINKS_MAX:
            for idle in [known for known, slot in self._slots.items() if slot.link is None]:
                del self._slots[idle]
        if len(self._slots) >= LINKS_MAX:
            raise Overloaded(f"this node is linked to {LINKS_MAX} peers, and to no more", retry_after_s=30)
        return self._slots.setdefault(peer, _Slot())

    def _made(self, peer: PeerId, slot: _Slot, place: _Place) -> Link:
        with slot.lock:
            if slot.link is not None and slot.place == place:
                return slot.link
            link = self._connected(peer, slot, place)
            old, slot.link, slot.place = slot.link, link, place
        if old is not None:
            self._retire(old)
        with self._lock:
            gone = self._slots.get(peer) is not slot
        if gone:  # forgotten, or all closed, while it was made
            link.close()
            raise PeerLost(f"the link to the peer {peer[:8]} was closed")
        return link

    def _retire(self, link: Link) -> None:
        """Closes it after a while: a call that begins on it meanwhile shall fail as a lost peer does."""
        now = time.monotonic()
        with self._lock:
            self._retired.append((now, link))
            due = []
            while self._retired and (
                self._closed or len(self._retired) > RETIRED_MAX or self._retired[0][0] + _RETIRED_S <= now
            ):
                due.append(self._retired.popleft()[1])
        for old in due:
            old.close()

    def _connected(self, peer: PeerId, slot: _Slot, place: _Place) -> Link:
        """Under the slot's lock.  Who waited for it while it failed fails with it."""
        if slot.last_failure is not None and time.monotonic() < slot.last_failure[0] + _RETRY_S:
            raise slot.last_failure[1]
        try:
            return connect(self._identity, place.address, plaintext=self.plaintext, peer=peer, timeout_s=self.timeout_s)
        except ShoalError as error:
            slot.last_failure = (time.monotonic(), error)
            raise


def _pinned(host_port: str, expected_sha256: bytes | None, timeout_s: float) -> Pin:
    pem, sha256 = certificate.fetch(host_port, timeout_s)
    if expected_sha256 not in (None, sha256):
        raise WrongPeer(f"the node at {host_port} shows another certificate than the one that is wanted")
    return Pin(pem, sha256)


def channel_options(lane: Lane) -> list[tuple[str, Any]]:
    """Of a channel that takes in replies of this lane."""
    return [*CHANNEL_OPTIONS, ("grpc.max_receive_message_length", REPLY_BYTES_MAX[lane])]


def _open(address: str, pin: Pin | None, lane: Lane) -> grpc.Channel:
    options = channel_options(lane)
    if pin is None:
        return grpc.insecure_channel(address, options=options)
    return grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(root_certificates=pin.pem),
        options=[*options, ("grpc.ssl_target_name_override", certificate.NAME)],
    )


class _typed(contextlib.AbstractContextManager[None]):  # noqa: N801  (reads as the function that it is)
    """Failed calls inside raise their typed errors; a channel that was closed meanwhile is a lost peer."""

    def __init__(self, address: str) -> None:
        self._address = address

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, grpc.RpcError):
            raise status.from_rpc(error, self._address) from None
        if isinstance(error, ValueError) and "closed channel" in str(error):
            raise PeerLost(f"the link to the node at {self._address} is closed") from None
