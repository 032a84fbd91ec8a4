"""What a running node refuses: calls without TLS, without a token, from who is not who he says, and beyond a limit.

Each refusal is typed and comes soon; afterwards the node answers others as before.
"""

from __future__ import annotations

import contextlib
import queue
import secrets
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from swarm import Swarm, ask, free_ports, request, spread

from node import certificate, status
from node.certificate import Certificate
from node.client import Client
from node.hello import TOKEN_KEY
from node.identity import Identity
from node.link import Lane, Link, connect, server_credentials
from node.network import open_network
from protos import expert_pb2, inference_pb2, peers_pb2, stage_pb2
from protos.errors import (
    ContextTooLong,
    InvalidRequest,
    InvalidSignature,
    Overloaded,
    PermissionDenied,
    ShoalError,
    Unauthenticated,
    Unavailable,
    WrongModel,
    WrongPeer,
)
from protos.expert_pb2_grpc import ExpertStub
from protos.peers_pb2_grpc import PeersStub
from protos.transcript import RECORD_DOMAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from oracle import Oracle, Oracles
    from swarm import Hatchery

pytestmark = pytest.mark.e2e

NETWORK = open_network().id
NEW = 8
SOON_S = 15.0
STREAMS_MAX = 3
OPEN_METHODS = {"/shoal.v1.Peers/Challenge", "/shoal.v1.Peers/Hello"}
METHODS = {
    f"/{service.full_name}/{method.name}": method
    for module in (inference_pb2, peers_pb2, stage_pb2, expert_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


@pytest.fixture(scope="module")
def oracle(oracle_of: Oracles) -> Oracle:
    return oracle_of("mixtral")


@pytest.fixture(scope="module")
def shoal(hatchery: Hatchery, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    settings: dict[str, object] = {"sessions_max": 2, "queue_max": 1}
    with Swarm(hatchery, tmp_path_factory.mktemp("swarm"), oracle.store, spread(2), settings=settings) as swarm:
        yield swarm


@pytest.fixture(autouse=True)
def _answers_as_before(shoal: Swarm, oracle: Oracle) -> Iterator[None]:
    """Whatever a test did to the nodes, nobody else is affected."""
    yield
    prompt = oracle.prompt(9)
    assert oracle.excuses(prompt, ask(shoal.client(0), prompt, NEW).tokens)


@pytest.fixture
def me() -> Identity:
    return Identity.create()


def call(channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> ShoalError | None:
    """What comes of an empty message; None: it was taken."""
    described = METHODS[method]
    kinds = {
        (False, False): "unary_unary",
        (False, True): "unary_stream",
        (True, False): "stream_unary",
        (True, True): "stream_stream",
    }
    asks, answers = described.client_streaming, described.server_streaming
    invoke = getattr(channel, kinds[asks, answers])(method, lambda _: b"", lambda data: data)
    try:
        reply = invoke(iter([b""]) if asks else b"", timeout=SOON_S, metadata=metadata)
        if answers:
            list(reply)
    except grpc.RpcError as error:
        return status.from_rpc(error, "the node")
    return None


def tls(address: str, pem: bytes | None = None) -> grpc.Channel:
    pinned = pem or certificate.fetch(address, SOON_S)[0]
    return grpc.secure_channel(
        address,
        grpc.ssl_channel_credentials(root_certificates=pinned),
        options=[("grpc.ssl_target_name_override", certificate.NAME)],
    )


def test_without_tls_nothing_is_answered(shoal: Swarm) -> None:
    with grpc.insecure_channel(shoal[1].address) as channel:
        for method in METHODS:
            assert isinstance(call(channel, method), Unavailable), method


@pytest.mark.parametrize("token", ["", "ab" * 32, "no hex at all"])
def test_without_a_token_in_force_every_method_but_hello_is_refused(shoal: Swarm, token: str) -> None:
    metadata = ((TOKEN_KEY, token),) if token else ()
    assert len(METHODS) > 10
    with tls(shoal[1].address) as channel:
        for method in METHODS.keys() - OPEN_METHODS:
            assert isinstance(call(channel, method, metadata), Unauthenticated), method


def test_a_token_of_one_node_is_worth_nothing_at_another(shoal: Swarm, me: Identity) -> None:
    link = connect(me, shoal[0].address, timeout_s=SOON_S)
    with contextlib.closing(link), tls(shoal[1].address) as channel:
        assert isinstance(call(channel, "/shoal.v1.Inference/Info", link.metadata()), Unauthenticated)


def test_another_certificate_than_the_pinned_one_is_no_connection(shoal: Swarm) -> None:
    with tls(shoal[1].address, Certificate.make(time.time()).pem) as channel:
        assert isinstance(call(channel, "/shoal.v1.Peers/Challenge"), Unavailable)


def test_who_answers_with_another_key_than_the_address_says_is_refused(shoal: Swarm, me: Identity) -> None:
    with pytest.raises(WrongPeer) as told:
        connect(me, f"{shoal[0].address}#{shoal[1].peer}", timeout_s=SOON_S)
    assert shoal[1].peer[:8] in told.value.message


def test_a_forged_hello_gets_no_token(shoal: Swarm, me: Identity) -> None:
    with tls(shoal[1].address) as channel:
        stub = PeersStub(channel)
        challenge = stub.Challenge(peers_pb2.ChallengeRequest(), timeout=SOON_S)
        hello = peers_pb2.HelloRequest(
            public_key=me.public_key,
            nonce=secrets.token_bytes(32),
            server_nonce=challenge.nonce,
            time_ms=int(time.time() * 1000),
            signature=secrets.token_bytes(64),
        )
        for expected in (InvalidSignature, Unauthenticated):  # the nonce is spent by the first attempt
            with pytest.raises(grpc.RpcError) as refused:
                stub.Hello(hello, timeout=SOON_S)
            assert isinstance(status.from_rpc(refused.value, "the node"), expected)


def test_a_relayed_hello_is_refused(shoal: Swarm, me: Identity) -> None:
    """Between the caller and the node stands one who has a certificate of his own, and passes on what they say."""
    own = Certificate.make(time.time())
    victim = shoal[1]
    with tls(victim.address) as onward, ThreadPoolExecutor(4) as pool:

        def relay(method: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
            def handle(data: bytes, context: grpc.ServicerContext) -> bytes:
                invoke: Any = onward.unary_unary(method, lambda raw: raw, lambda raw: raw)
                try:
                    return invoke(data, timeout=SOON_S)  # type: ignore[no-any-return]
                except grpc.RpcError as error:
                    context.set_trailing_metadata(error.trailing_metadata())
                    context.abort(error.code(), error.details())
                    raise

            return handle

        handlers = {
            method.rpartition("/")[2]: grpc.unary_unary_rpc_method_handler(relay(method)) for method in OPEN_METHODS
        }
        server = grpc.server(pool)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("shoal.v1.Peers", handlers),))
        port = server.add_secure_port("127.0.0.1:0", server_credentials(own))
        server.start()
        try:
            with pytest.raises(InvalidSignature):
                connect(me, f"127.0.0.1:{port}#{victim.peer}", timeout_s=SOON_S)
        finally:
            server.stop(0).wait()


@pytest.mark.parametrize("method", ["/shoal.v1.Stage/Open", "/shoal.v1.Stage/Truncate", "/shoal.v1.Stage/Close"])
def test_who_has_no_record_here_may_not_use_stages(shoal: Swarm, me: Identity, method: str) -> None:
    link = connect(me, shoal[1].address, timeout_s=SOON_S)
    with contextlib.closing(link):
        assert isinstance(call(link.channel(Lane.CONTROL), method, link.metadata()), PermissionDenied)


def test_a_record_with_a_bad_signature_is_refused_and_changes_nothing(shoal: Swarm, me: Identity) -> None:
    before = {peer.peer_id for peer in shoal.peers(1).peers}
    record = peers_pb2.Record(
        public_key=me.public_key,
        addresses=["127.0.0.1:1"],
        protocol=1,
        sequence=int(time.time() * 1000),
        issued_at_ms=int(time.time() * 1000),
        expires_at_ms=int(time.time() * 1000) + 3_600_000,
        network=NETWORK,
    ).SerializeToString()
    link = connect(me, shoal[1].address, timeout_s=SOON_S)
    with contextlib.closing(link):
        stub = PeersStub(link.channel(Lane.CONTROL))
        forged = _sync(peers_pb2.SignedRecord(record=record, signature=secrets.token_bytes(64)))
        with pytest.raises(grpc.RpcError) as refused:
            stub.Sync(forged, timeout=SOON_S, metadata=link.metadata())
        assert isinstance(status.from_rpc(refused.value, "the node"), InvalidSignature)
        # What is no record is nobody's, and keeps nobody's out.
        stub.Sync(_sync(peers_pb2.SignedRecord(record=record, signature=b"short")), metadata=link.metadata())
    assert {peer.peer_id for peer in shoal.peers(1).peers} == before


def test_streams_of_expert_calls_beyond_the_limit_are_refused_at_once(
    hatchery: Hatchery, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """From nodes that are known here, as any that is let in may be, and whose streams say nothing."""
    ends: queue.SimpleQueue[None] = queue.SimpleQueue()
    settings: dict[str, object] = {"expert_streams_max": STREAMS_MAX}
    with (
        Swarm(hatchery, tmp_path_factory.mktemp("swarm"), oracle.store, spread(2), settings=settings) as swarm,
        contextlib.ExitStack() as stack,
    ):
        prompt = oracle.prompt(9)
        assert oracle.excuses(prompt, ask(swarm.client(0), prompt, NEW).tokens)  # that node's stream is there now

        def stream() -> Any:
            link = _introduced(swarm[1].address)
            stack.callback(link.close)
            stack.callback(ends.put, None)
            return ExpertStub(link.channel(Lane.EXPERTS)).Compute(
                (pb for pb in iter(ends.get, None)), metadata=link.metadata(), timeout=SOON_S * 4
            )

        taken = [stream() for _ in range(STREAMS_MAX - 1)]
        for each in taken:
            each.initial_metadata()  # it has begun
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as refused:
            next(stream())
        assert isinstance(status.from_rpc(refused.value, "the node"), Overloaded)
        assert time.monotonic() - began < SOON_S
        assert oracle.excuses(prompt, ask(swarm.client(0), prompt, NEW).tokens)


def _introduced(address: str) -> Link:
    """A link of a new node that has told its record, holds nothing, and is nowhere to be called."""
    me = Identity.create()
    link = connect(me, address, timeout_s=SOON_S)
    now = int(time.time() * 1000)
    record = peers_pb2.Record(
        public_key=me.public_key,
        addresses=["127.0.0.1:1"],
        certificate_sha256=bytes(32),
        protocol=1,
        sequence=now,
        issued_at_ms=now,
        expires_at_ms=now + 3_600_000,
        network=NETWORK,
    ).SerializeToString()
    signed = peers_pb2.SignedRecord(record=record, signature=me.sign(RECORD_DOMAIN, record))
    PeersStub(link.channel(Lane.CONTROL)).Sync(_sync(signed), timeout=SOON_S, metadata=link.metadata())
    return link


def _sync(record: peers_pb2.SignedRecord) -> peers_pb2.SyncRequest:
    return peers_pb2.SyncRequest(network=NETWORK, records=[record.SerializeToString()])


def test_more_answers_than_the_limit_are_refused_at_once(shoal: Swarm, oracle: Oracle) -> None:
    client = shoal.client(0)
    streams = [client.generate(request(oracle.prompt(5), 400)) for _ in range(4)]
    with ThreadPoolExecutor(len(streams)) as pool:
        firsts = [pool.submit(next, stream) for stream in streams]
        refused = [isinstance(first.exception(SOON_S * 2), Overloaded) for first in firsts]
    assert sum(refused) >= 1
    for stream in streams:
        stream.close()


BAD: list[tuple[type[ShoalError], Callable[[], inference_pb2.GenerateRequest]]] = [
    (InvalidRequest, lambda: request([], NEW)),
    (InvalidRequest, lambda: request([5, 1 << 40], NEW)),
    (ContextTooLong, lambda: request([5], 1 << 19)),
    (WrongModel, lambda: inference_pb2.GenerateRequest(model="0" * 64, token_ids=inference_pb2.TokenIds(ids=[5]))),
]


@pytest.mark.parametrize(("error", "make"), BAD)
def test_what_cannot_be_answered_is_refused_by_its_reason(
    shoal: Swarm, error: type[ShoalError], make: Callable[[], inference_pb2.GenerateRequest]
) -> None:
    with pytest.raises(error):
        list(shoal.client(1).generate(make()))


@pytest.mark.parametrize("accepts", [False, True])
def test_an_address_where_nobody_listens_or_answers_is_told_soon(accepts: bool) -> None:
    with _deaf(accepts) as address:
        began = time.monotonic()
        with pytest.raises(Unavailable) as told, Client(address) as client:
            client.info()
        assert address in told.value.message
        assert time.monotonic() - began < SOON_S


@pytest.mark.parametrize("accepts", [False, True])
def test_a_node_serves_though_whom_it_joins_does_not_answer(
    hatchery: Hatchery, oracle: Oracle, tmp_path_factory: pytest.TempPathFactory, accepts: bool
) -> None:
    with (
        _deaf(accepts) as address,
        Swarm(hatchery, tmp_path_factory.mktemp("swarm"), oracle.store, [["all"]], "--join", address) as swarm,
    ):
        prompt = oracle.prompt(9)
        assert oracle.excuses(prompt, ask(swarm.client(0), prompt, NEW).tokens)
        assert swarm[0].end() == 0
        assert "Traceback" not in swarm[0].errors


@contextlib.contextmanager
def _deaf(accepts: bool) -> Iterator[str]:
    """An address that takes connections and never answers; or where nobody listens."""
    if not accepts:
        yield f"127.0.0.1:{free_ports(1)[0]}"
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
