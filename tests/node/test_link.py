"""PROTOCOL.md section 13 over real gRPC: first contact, tokens, pins, and what is refused."""

from __future__ import annotations

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import pytest
from toy_peers import PeerNode, eventually

from node import link as node_link
from node.certificate import Certificate
from node.hello import TOKEN_S, Authentication, caller_of
from node.identity import Identity
from node.link import SERVER_OPTIONS, Lane, Link, Links, Pin, channel_options, connect, server_credentials
from protos import peers_pb2 as pb
from protos.errors import (
    InvalidRequest,
    InvalidSignature,
    Overloaded,
    PeerLost,
    PermissionDenied,
    ShoalError,
    Unauthenticated,
    WrongPeer,
)
from protos.expert_pb2_grpc import ExpertStub, add_ExpertServicer_to_server
from protos.ids import PeerId
from protos.limits import STAGE_MESSAGE_BYTES_MAX
from protos.peers_pb2_grpc import PeersServicer, PeersStub, add_PeersServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Iterator

    from protos.expert_pb2 import ComputeRequest

ME = Identity.create()


@pytest.fixture
def node() -> Iterator[PeerNode]:
    with PeerNode() as running:
        yield running


@pytest.fixture
def link(node: PeerNode) -> Iterator[Link]:
    made = connect(ME, node.address)
    yield made
    made.close()


def ask(link: Link) -> pb.SignedRecord:
    return link.call(lambda channel: PeersStub(channel).Record, pb.RecordRequest(), timeout_s=5.0)


def known(link: Link) -> None:
    """The call was let in, and answered."""
    assert ask(link).record


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_first_contact_finds_out_who_answers(node: PeerNode, link: Link) -> None:
    assert link.peer == node.peer
    assert link.pin is not None
    assert link.pin.sha256 == node.sha256
    known(link)


def test_an_address_may_name_whom_to_expect(node: PeerNode) -> None:
    link = connect(ME, f"{node.address}#{node.peer}", certificate_sha256=node.sha256, peer=node.peer)
    assert (link.peer, link.address) == (node.peer, node.address)
    link.close()


def test_another_peer_than_the_expected_one_is_refused(node: PeerNode) -> None:
    for address, peer in ((f"{node.address}#{ME.peer}", None), (node.address, ME.peer)):
        with pytest.raises(WrongPeer, match=node.peer[:8]):
            connect(ME, address, peer=peer)
    with pytest.raises(WrongPeer):
        connect(ME, f"{node.address}#{node.peer}", peer=ME.peer)


def test_another_certificate_than_the_expected_one_is_refused(node: PeerNode) -> None:
    with pytest.raises(WrongPeer, match="certificate"):
        connect(ME, node.address, certificate_sha256=b"x" * 32)


def test_a_wrong_pin_ends_the_connection(node: PeerNode) -> None:
    other = Certificate.make(time.time())
    link = Link(ME, node.address, Pin(other.pem, other.sha256))
    with pytest.raises(PeerLost):
        link.metadata()
    link.close()


def test_a_hello_that_says_another_certificate_than_the_connection_has_is_refused(node: PeerNode) -> None:
    link = Link(ME, node.address, Pin(node.certificate.pem, b"x" * 32))
    with pytest.raises(InvalidSignature):
        link.metadata()
    link.close()


class Relay(PeersServicer):
    """A man in the middle: another certificate, and everything else forwarded."""

    def __init__(self, to: PeerNode, forged: pb.HelloReply | None = None) -> None:
        self._forged = forged
        self.seen: list[str] = []
        self.certificate = Certificate.make(time.time())
        self._to = grpc.secure_channel(
            to.address,
            grpc.ssl_channel_credentials(to.certificate.pem),
            options=[("grpc.ssl_target_name_override", "shoal")],
        )
        self._stub = PeersStub(self._to)
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_PeersServicer_to_server(self, self._server)  # type: ignore[arg-type]
        port = self._server.add_secure_port("127.0.0.1:0", server_credentials(self.certificate))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def Challenge(self, request: pb.ChallengeRequest, context: grpc.ServicerContext) -> pb.ChallengeReply:  # noqa: N802
        self.seen.append("Challenge")
        return self._stub.Challenge(request)

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloReply:  # noqa: N802
        self.seen.append("Hello")
        if self._forged is not None:
            return self._forged
        try:
            return self._stub.Hello(request)
        except grpc.RpcError as error:
            context.set_trailing_metadata(error.trailing_metadata())
            context.abort(error.code(), error.details())
            raise

    def Record(self, request: object, context: grpc.ServicerContext) -> None:  # noqa: N802
        self.seen.append("Record")

    def close(self) -> None:
        self._to.close()
        self._server.stop(None).wait()


def test_a_relayed_hello_is_refused(node: PeerNode) -> None:
    relay = Relay(node)
    with pytest.raises(InvalidSignature):
        connect(ME, f"{relay.address}#{node.peer}")
    assert relay.seen == ["Challenge", "Hello"]
    assert node.callers._tokens == {}
    relay.close()


def test_a_relay_that_signs_in_its_own_name_is_refused(node: PeerNode) -> None:
    relay = Relay(node, forged=pb.HelloReply(signature=ME.sign(b"", b""), token=b"t" * 32, token_s=600))
    with pytest.raises(InvalidSignature):
        connect(ME, relay.address)
    relay.close()


def test_where_nothing_listens_the_peer_is_lost_at_once() -> None:
    began = time.monotonic()
    for plaintext in (False, True):
        address = free_address()
        with pytest.raises(PeerLost, match=address):
            connect(ME, address, plaintext=plaintext)
    assert time.monotonic() - began < 2.0


def test_who_accepts_and_never_answers_is_given_up_at_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        for plaintext in (False, True):
            with pytest.raises(ShoalError) as error:
                connect(ME, address, plaintext=plaintext, timeout_s=0.2)
            assert error.value.code in ("peer_lost", "deadline_exceeded")


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(InvalidRequest):
        connect(ME, "nowhere")


def test_an_unencrypted_call_to_a_node_fails(node: PeerNode) -> None:
    with pytest.raises(PeerLost):
        connect(ME, node.address, plaintext=True)
    with grpc.insecure_channel(node.address) as channel, pytest.raises(grpc.RpcError) as refused:
        PeersStub(channel).Challenge(pb.ChallengeRequest(), timeout=5.0)
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


def test_plaintext_needs_the_word_on_both_sides() -> None:
    with PeerNode(plaintext=True) as node:
        with pytest.raises(PeerLost, match="no TLS"):
            connect(ME, node.address)
        link = connect(ME, node.address, plaintext=True)
        assert link.peer == node.peer
        known(link)
        link.close()


def secure(node: PeerNode) -> grpc.Channel:
    options = [("grpc.ssl_target_name_override", "shoal")]
    return grpc.secure_channel(node.address, grpc.ssl_channel_credentials(node.certificate.pem), options=options)


def refusal(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refused:
        call()  # type: ignore[operator]
    return refused.value.code(), dict(refused.value.trailing_metadata()).get("shoal-code", "")


@pytest.mark.parametrize("metadata", [(), (("shoal-token", "00" * 32),), (("shoal-token", "x"),)])
def test_no_call_but_challenge_and_hello_passes_without_a_token(node: PeerNode, metadata: tuple) -> None:
    never = threading.Event()

    def silent() -> Iterator[ComputeRequest]:
        never.wait(20)
        yield from ()

    with secure(node) as channel:
        stub = PeersStub(channel)
        assert len(stub.Challenge(pb.ChallengeRequest(), timeout=5.0).nonce) == 32
        assert refusal(lambda: stub.Hello(pb.HelloRequest(), timeout=5.0))[1] == "invalid_request"
        told = (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated")
        assert refusal(lambda: stub.Record(pb.RecordRequest(), metadata=metadata, timeout=5.0)) == told
        for method in ("/shoal.v1.Nowhere/To", "/shoal.v1.Peers/challenge", "/shoal.v1.Inference/Info"):
            call = channel.unary_unary(method)
            assert refusal(lambda call=call: call(b"", metadata=metadata, timeout=5.0)) == told
        # A stream is refused although its caller sends nothing.
        stream = ExpertStub(channel).Compute(silent(), metadata=metadata, timeout=5.0)
        assert refusal(lambda: list(stream)) == told
        never.set()


def test_a_refused_call_is_refused_before_its_message_is_read(node: PeerNode) -> None:
    with secure(node) as channel:
        call = channel.unary_unary("/shoal.v1.Peers/Record")
        assert refusal(lambda: call(b"\xff" * 1024, timeout=5.0))[1] == "unauthenticated"


def test_the_interceptor_keeps_a_methods_own_thread_pool_and_says_who_calls() -> None:
    ran_in: list[str] = []
    with PeerNode() as node:
        own = ThreadPoolExecutor(1, thread_name_prefix="own-pool")

        class Behaviour:
            experimental_thread_pool = own

            def __call__(self, requests: Iterator[ComputeRequest], context: grpc.ServicerContext) -> Iterator[object]:
                ran_in.append(threading.current_thread().name)
                ran_in.append(caller_of(context).peer)
                yield from ()

        class Experts:
            Compute = Behaviour()

        server = grpc.server(ThreadPoolExecutor(1), interceptors=[Authentication(node.callers)])
        add_ExpertServicer_to_server(Experts(), server)  # type: ignore[arg-type]
        node.service.add_to(server)
        port = server.add_secure_port("127.0.0.1:0", server_credentials(node.certificate))
        server.start()
        link = connect(ME, f"127.0.0.1:{port}")
        assert list(ExpertStub(link.channel(Lane.EXPERTS)).Compute(iter(()), metadata=link.metadata())) == []
        link.close()
        server.stop(None).wait()
        own.shutdown()
    assert ran_in == ["own-pool_0", ME.peer]


def test_without_the_interceptor_nobody_is_known() -> None:
    with pytest.raises(Unauthenticated):
        caller_of(None)  # type: ignore[arg-type]


def test_what_nodes_ask_is_for_nodes_with_a_record() -> None:
    with PeerNode(permit=True) as node, PeerNode() as friend:
        link = connect(friend.identity, node.address)

        def compute() -> None:
            list(ExpertStub(link.channel(Lane.EXPERTS)).Compute(iter(()), metadata=link.metadata(), timeout=5.0))

        assert refusal(compute) == (grpc.StatusCode.PERMISSION_DENIED, PermissionDenied.code)
        friend.peers.gossip._exchange(link)
        assert refusal(compute)[0] is grpc.StatusCode.UNIMPLEMENTED
        link.close()


# --- tokens -------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def clocked(node: PeerNode) -> tuple[Link, Clock]:
    clock = Clock()
    return Link(ME, node.address, Pin(node.certificate.pem, node.sha256), clock=clock), clock


def test_a_token_is_kept_and_renewed_at_half_its_life(node: PeerNode) -> None:
    link, clock = clocked(node)
    first = link.metadata()
    clock.now += TOKEN_S / 2 - 1
    assert link.metadata() is first
    clock.now += 2
    assert link.metadata() != first
    link.close()


def test_a_renewal_that_fails_leaves_the_token_until_it_ends(node: PeerNode) -> None:
    link, clock = clocked(node)
    first = link.metadata()
    node.stop()
    clock.now += TOKEN_S / 2 + 1
    assert link.metadata() is first
    clock.now += TOKEN_S / 2
    with pytest.raises(PeerLost):
        link.metadata()
    link.close()


def test_a_token_that_the_peer_forgot_is_renewed_by_the_call_itself(node: PeerNode, link: Link) -> None:
    node.callers._tokens.clear()
    node.callers._of_peer.clear()
    known(link)


def test_a_peer_that_takes_no_token_is_asked_twice_and_not_more(node: PeerNode, link: Link) -> None:
    node.callers.caller = deny = Denying()  # type: ignore[method-assign]
    with pytest.raises(Unauthenticated):
        ask(link)
    assert deny.times == 2


class Denying:
    times = 0

    def __call__(self, *_: object) -> None:
        self.times += 1
        raise Unauthenticated("no")


def test_many_threads_need_one_hello(node: PeerNode) -> None:
    link, _ = clocked(node)
    got: list[object] = []
    threads = [threading.Thread(target=lambda: got.append(link.metadata())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(got) == 8
    assert len(set(got)) == 1
    assert len(node.callers._tokens) == 1
    link.close()


def test_threads_that_wait_for_a_failing_hello_fail_with_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        link = Link(ME, f"127.0.0.1:{silent.getsockname()[1]}", None, hello_s=0.4)
        errors: list[ShoalError] = []

        def ask() -> None:
            try:
                link.metadata()
            except ShoalError as error:
                errors.append(error)

        began = time.monotonic()
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(errors) == 8
        assert time.monotonic() - began < 8 * 0.4
        link.close()


def test_a_reply_without_a_token_is_refused(node: PeerNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.callers, "_give", lambda *_: b"short")
    with pytest.raises(InvalidRequest, match="no token"):
        connect(ME, node.address)


def test_a_challenge_without_a_nonce_is_refused(node: PeerNode) -> None:
    node.callers.challenge = lambda _: pb.ChallengeReply(public_key=node.identity.public_key)  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match="no nonce"):
        connect(ME, node.address)


# --- lanes and links ----------------------------------------------------------------------------------------------


def test_each_lane_has_a_channel_of_its_own(link: Link) -> None:
    channels = {lane: link.channel(lane) for lane in Lane}
    assert len(set(map(id, channels.values()))) == len(Lane)
    assert link.channel(Lane.BULK) is channels[Lane.BULK]


def test_a_closed_link_is_a_lost_peer(link: Link) -> None:
    link.close()
    with pytest.raises(PeerLost):
        link.channel(Lane.STEPS)
    with pytest.raises(PeerLost):
        ask(link)


def test_both_sides_take_the_largest_message_and_pings_as_often_as_they_come() -> None:
    caller, server = dict(channel_options(Lane.STEPS)), dict(SERVER_OPTIONS)
    for options in (caller, server):
        assert options["grpc.max_receive_message_length"] == STAGE_MESSAGE_BYTES_MAX
        assert options["grpc.http2.ping_timeout_ms"] == options["grpc.keepalive_timeout_ms"] == 5000
    assert server["grpc.http2.min_ping_interval_without_data_ms"] < caller["grpc.keepalive_time_ms"]


def test_links_are_made_once_from_what_a_record_says(node: PeerNode) -> None:
    links = Links(ME)
    with pytest.raises(PeerLost, match="no address"):
        links.to(node.peer)
    links.learn(node.peer, node.address, node.sha256)
    first = links.to(node.peer)
    assert links.to(node.peer, "elsewhere:1") is first
    known(first)
    links.forget(node.peer)
    with pytest.raises(PeerLost):
        first.channel(Lane.STEPS)
    assert links.to(node.peer, node.address) is links.to(node.peer)
    links.close()
    with pytest.raises(PeerLost, match="leaving"):
        links.to(node.peer)


def test_in_a_permissioned_network_nobody_is_called_whose_record_is_unknown(node: PeerNode) -> None:
    links = Links(ME, known_only=True)
    with pytest.raises(PeerLost, match="no address"):
        links.to(node.peer, node.address)
    links.learn(node.peer, node.address, node.sha256)
    known(links.to(node.peer, node.address))
    links.forget(node.peer)
    with pytest.raises(PeerLost, match="no address"):
        links.to(node.peer, node.address)
    links.close()


def test_a_peer_that_is_not_where_its_record_says_is_refused(node: PeerNode) -> None:
    links = Links(ME)
    links.learn(ME.peer, node.address, None)
    with pytest.raises(WrongPeer):
        links.to(ME.peer)
    links.close()


def test_a_restarted_peer_gets_a_new_link_as_soon_as_somebody_checks(node: PeerNode) -> None:
    links = Links(ME)
    links.learn(node.peer, node.address, node.sha256)
    old = links.to(node.peer)
    assert not links.check(node.peer, 5.0)
    node.stop()
    with pytest.raises(PeerLost):
        links.check(node.peer, 5.0)
    with PeerNode(identity=node.identity, port=node.port) as again:
        with pytest.raises(ShoalError):
            ask(old)
        assert links.check(node.peer, 5.0)
        new = links.to(node.peer)
        assert new is not old
        assert new.pin.sha256 == again.sha256 != node.sha256
        known(new)
        # Its record comes later, and changes nothing.
        links.learn(node.peer, again.address, again.sha256)
        known(links.to(node.peer))
        with pytest.raises(ShoalError):  # not ValueError, as of a closed channel
            ask(old)
    links.close()


def test_a_peer_that_comes_back_is_reached_again_within_about_a_second(node: PeerNode) -> None:
    """By the same channel: with the same certificate, as after a network's outage."""
    link = connect(ME, node.address)
    node.stop()
    for _ in range(20):
        with pytest.raises(ShoalError):
            ask(link)
    again = PeerNode(identity=node.identity, port=node.port, certificate=node.certificate)
    began = time.monotonic()
    eventually(lambda: is_reached(link))
    assert time.monotonic() - began < 3.0
    again.stop()
    link.close()


def is_reached(link: Link) -> bool:
    try:
        known(link)
    except ShoalError:
        return False
    return True


def test_links_to_so_many_peers_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_link, "LINKS_MAX", 2)
    with PeerNode() as one, PeerNode() as two, PeerNode() as three:
        links = Links(ME)
        with pytest.raises(PeerLost):
            links.to(PeerId("nobody"), free_address())
        for peer in (one, two):
            links.to(peer.peer, peer.address)
        with pytest.raises(Overloaded):
            links.to(three.peer, three.address)
        links.forget(one.peer)
        known(links.to(three.peer, three.address))
        links.close()


def test_so_many_replaced_links_stay_open_for_a_while_and_no_more(
    node: PeerNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_link, "RETIRED_MAX", 2)
    links = Links(ME)
    made = []
    for n in range(4):
        links.learn(node.peer, node.address, bytes([n]) * 32)
        made.append(links.to(node.peer))
    with pytest.raises(PeerLost):
        made[0].channel(Lane.STEPS)
    for link in made[1:]:
        link.channel(Lane.STEPS)
    links.close()
    for link in made:
        with pytest.raises(PeerLost):
            link.channel(Lane.STEPS)


def test_threads_that_wait_for_a_lost_peers_link_fail_with_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        links = Links(ME, timeout_s=0.4)
        links.learn(PeerId("p"), f"127.0.0.1:{silent.getsockname()[1]}", None)
        errors: list[ShoalError] = []

        def ask() -> None:
            try:
                links.to(PeerId("p"))
            except ShoalError as error:
                errors.append(error)

        began = time.monotonic()
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert {error.code for error in errors} == {"peer_lost"}
        assert len(errors) == 8
        assert time.monotonic() - began < 8 * 0.4
        links.close()
