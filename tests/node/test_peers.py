"""PROTOCOL.md section 14 over real gRPC: nodes learn each other, and lose each other."""

from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from toy_peers import MODEL, PeerNode, eventually

from coordinator.view import Health
from node.identity import Identity
from node.link import connect
from node.peers import SEEDS_AT_ONCE_MAX, TRIES_AT_ONCE_MAX, Peers
from node.record import Held, Record, sign
from protos import peers_pb2 as pb
from protos.errors import FrameTooLarge, ShoalError
from protos.limits import PEERS_MESSAGE_BYTES_MAX
from protos.peers_pb2_grpc import PeersStub

if TYPE_CHECKING:
    from collections.abc import Sequence

    from node.link import Link


def live(node: PeerNode) -> set[str]:
    return set(node.peers.view(MODEL).live())


def all_see(nodes: Sequence[PeerNode]) -> None:
    """Every node's view has all of them, alive."""
    wanted = {node.peer for node in nodes}
    eventually(lambda: all(live(node) == wanted for node in nodes))
    eventually(lambda: all(set(node.peers.view(MODEL).health.values()) == {Health.ALIVE} for node in nodes))


def health(node: PeerNode, of: PeerNode) -> Health:
    return node.peers.view(MODEL).health_of(of.peer)


@pytest.mark.parametrize("plaintext", [False, True])
def test_two_nodes_learn_each_other_from_one_address(plaintext: bool) -> None:
    with PeerNode(plaintext=plaintext).start() as one, PeerNode([one.address], plaintext=plaintext).start() as two:
        all_see([one, two])
        seen = one.peers.view(MODEL).records[two.peer]
        assert (seen.address, seen.layers, seen.experts) == (two.address, range(2), {0: 5, 1: 5})
        assert 0 < one.peers.view(MODEL).rtt_of(two.peer) < 2.0
        assert one.links.to(two.peer).address == two.address


def test_nodes_that_joined_one_learn_all_others() -> None:
    with (
        PeerNode().start() as seed,
        PeerNode([f"{seed.address}#{seed.peer}"]).start() as second,
        PeerNode([seed.address]).start() as third,
        PeerNode([second.address]).start() as fourth,
    ):
        all_see([seed, second, third, fourth])
        assert [status.state for status in fourth.peers.status()] == ["self", "alive", "alive", "alive"]


def test_a_seed_that_starts_later_is_joined_then() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with PeerNode([f"127.0.0.1:{port}"]).start() as early:
        eventually(lambda: early.peers._seeds[0].misses > 0)
        with PeerNode(port=port).start() as seed:
            all_see([early, seed])


def test_a_node_that_joins_itself_stays_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with PeerNode([f"127.0.0.1:{port}"], port=port).start() as node:
        eventually(lambda: node.peers._seeds[0].peer == node.peer)
        assert live(node) == {node.peer}


def test_an_address_where_another_answers_joins_nobody() -> None:
    with PeerNode().start() as seed, PeerNode([f"{seed.address}#{'a' * 52}"]).start() as node:
        eventually(lambda: "answers" in node.peers._seeds[0].told)
        assert node.peers._seeds[0].retry_at > time.monotonic() + 1.0
        assert live(node) == {node.peer}


def test_a_killed_peer_is_dead_soon_and_alive_again_when_it_is_back() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        began = time.monotonic()
        two.stop()
        eventually(lambda: health(one, two) is Health.DEAD)
        assert time.monotonic() - began < 3.0
        assert one.peers.view(MODEL).live() == [one.peer]
        # Another certificate, and it joins nobody: the first node finds it again where it was.
        with PeerNode(identity=two.identity, port=two.port).start() as again:
            all_see([one, again])
            assert one.links.to(two.peer).pin.sha256 == again.sha256


def test_a_peer_that_comes_back_elsewhere_is_found_by_its_record() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        two.stop()
        with PeerNode([one.address], identity=two.identity).start() as again:
            all_see([one, again])
            assert one.peers.view(MODEL).records[two.peer].address == again.address
            assert one.links.to(two.peer).address == again.address


def test_what_a_node_publishes_later_reaches_the_others() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        two.peers.publish([Held(MODEL, experts={1: 0b11})])
        eventually(lambda: one.peers.view(MODEL).records[two.peer].experts == {1: 0b11})


def test_a_peer_that_never_answers_delays_nobody_else() -> None:
    """One listens and says nothing, as a frozen process does."""
    with socket.create_server(("127.0.0.1", 0)) as frozen, PeerNode().start() as one:
        silent = f"127.0.0.1:{frozen.getsockname()[1]}"
        with PeerNode([silent, one.address]).start() as two:
            began = time.monotonic()
            all_see([one, two])
            assert time.monotonic() - began < 4.0


def test_so_many_exchanges_run_at_once_and_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as frozen:
        silent = f"127.0.0.1:{frozen.getsockname()[1]}"
        with PeerNode([silent] * (TRIES_AT_ONCE_MAX + 4)).start() as node:
            eventually(lambda: sum(seed.busy for seed in node.peers._seeds) == SEEDS_AT_ONCE_MAX)
            for _ in range(TRIES_AT_ONCE_MAX):
                node.peers.merge([_unreachable(silent)], node.peer)
            eventually(lambda: node.peers._room() == 0)
            assert sum(seed.busy for seed in node.peers._seeds) == SEEDS_AT_ONCE_MAX


def _unreachable(address: str) -> pb.SignedRecord:
    """Of a peer whom nobody has reached."""
    now_ms = int(time.time() * 1000)
    identity = Identity.create()
    return sign(Record(identity.public_key, (address,), None, now_ms, now_ms, now_ms + 60_000), identity)


def test_seeds_and_peers_that_do_not_answer_leave_a_place_for_those_that_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    exchange = Peers._exchange

    def counted(self: Peers, link: Link) -> None:
        exchange(self, link)
        asked.append(link.peer)

    monkeypatch.setattr(Peers, "_exchange", counted)
    with socket.create_server(("127.0.0.1", 0), backlog=64) as frozen:
        silent = f"127.0.0.1:{frozen.getsockname()[1]}"
        with PeerNode() as one, PeerNode([one.address, *[silent] * TRIES_AT_ONCE_MAX]) as two:
            two.start()
            eventually(lambda: live(two) == {one.peer, two.peer})
            for _ in range(TRIES_AT_ONCE_MAX):
                two.peers.merge([_unreachable(silent)], two.peer)
            eventually(lambda: two.peers._room() <= 1)
            before, began = len(asked), time.monotonic()
            eventually(lambda: len(asked) > before + 5)
            assert time.monotonic() - began < 4.0  # and none of those that do not answer was given up meanwhile


def test_a_bug_in_an_exchange_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        healthy = two.peers.request
        monkeypatch.setattr(two.peers, "request", lambda _: 1 / 0)
        eventually(lambda: health(two, one) is not Health.ALIVE)
        monkeypatch.setattr(two.peers, "request", healthy)
        all_see([one, two])


def test_a_bug_in_the_service_is_told_as_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    with PeerNode() as one, PeerNode() as two:
        monkeypatch.setattr(one.peers, "admit", lambda *_: 1 / 0)
        link = connect(two.identity, one.address)
        with pytest.raises(ShoalError, match="ZeroDivisionError") as error:
            link.call(lambda channel: PeersStub(channel).Exchange, pb.ExchangeRequest(), timeout_s=5.0)
        assert error.value.code == "remote_error"
        link.close()


def test_an_exchange_beyond_the_limit_is_refused() -> None:
    with PeerNode() as one, PeerNode() as two:
        link = connect(two.identity, one.address)
        request = pb.ExchangeRequest(records=[pb.SignedRecord(record=bytes(PEERS_MESSAGE_BYTES_MAX))])
        with pytest.raises(FrameTooLarge, match=str(PEERS_MESSAGE_BYTES_MAX)):
            link.call(lambda channel: PeersStub(channel).Exchange, request, timeout_s=5.0)
        link.close()


def test_nothing_is_left_when_nodes_end() -> None:
    before = threading.active_count()
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
    # trio keeps idle threads of its own for a few seconds.
    eventually(lambda: threading.active_count() <= before + TRIES_AT_ONCE_MAX)
