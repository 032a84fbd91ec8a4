"""Nodes over real gRPC and real datagrams: they learn each other, and lose each other.  PROTOCOL.md, 14 and 15."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from toy_peers import MODEL, PeerNode, eventually

from coordinator.view import Health
from node import grant as grants
from node.claim import hash_of
from node.contact import Source
from node.grant import Grant
from node.identity import Identity
from node.issuer import RECORD_GAP_S
from node.link import connect
from node.member import State
from node.network import open_network, permissioned
from node.peers_service import CALLERS_MAX, SYNC_BURST
from node.record import Held
from protos import peers_pb2 as pb
from protos.errors import FrameTooLarge, GrantMissing, Overloaded, PeerLost, PermissionDenied, ShoalError, WrongNetwork
from protos.limits import DIAL_BACKS_AT_ONCE_MAX, PEERS_MESSAGE_BYTES_MAX
from protos.peers_pb2_grpc import PeersStub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from node.contact import Status


def live(node: PeerNode) -> set[str]:
    return set(node.peers.view(MODEL).live())


def all_see(nodes: Sequence[PeerNode]) -> None:
    """Every node's view has all of them, alive."""
    wanted = {node.peer for node in nodes}
    eventually(lambda: all(live(node) == wanted for node in nodes))
    eventually(lambda: all(set(node.peers.view(MODEL).health.values()) == {Health.ALIVE} for node in nodes))


def health(node: PeerNode, of: PeerNode) -> Health:
    return node.peers.view(MODEL).health_of(of.peer)


def believed(node: PeerNode, of: PeerNode) -> State | None:
    return node.peers.roster._states.get(of.peer)


def seed_of(node: PeerNode) -> Status:
    (found,) = [status for status in node.peers.contacts() if status.source is Source.SEED]
    return found


@pytest.mark.parametrize("plaintext", [False, True])
def test_two_nodes_learn_each_other_from_one_address(plaintext: bool) -> None:
    with PeerNode(plaintext=plaintext).start() as one, PeerNode([one.address], plaintext=plaintext).start() as two:
        all_see([one, two])
        seen = one.peers.view(MODEL).records[two.peer]
        assert (seen.address, seen.layers, seen.experts) == (two.address, range(2), {0: 5, 1: 5})
        eventually(lambda: 0 < one.peers.view(MODEL).rtt_of(two.peer) < 2.0)
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
        eventually(lambda: {status.island for status in fourth.peers.status()} == {"home"})


def test_a_seed_that_starts_later_is_joined_then() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with PeerNode([f"127.0.0.1:{port}"]).start() as early:
        eventually(lambda: seed_of(early).why != "")
        with PeerNode(port=port).start() as seed:
            all_see([early, seed])


def test_a_node_that_joins_itself_stays_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    with PeerNode([f"127.0.0.1:{port}"], port=port).start() as node:
        eventually(lambda: seed_of(node).peer == node.peer)
        assert live(node) == {node.peer}


def test_an_address_where_another_answers_joins_nobody() -> None:
    with PeerNode().start() as seed, PeerNode([f"{seed.address}#{'a' * 52}"]).start() as node:
        eventually(lambda: "answers" in seed_of(node).why)
        assert live(node) == {node.peer}


def test_a_killed_peer_is_dead_soon_and_alive_again_when_it_is_back() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        two.stop()
        eventually(lambda: health(one, two) is Health.DEAD)
        assert believed(one, two) is State.DEAD
        assert one.peers.view(MODEL).live() == [one.peer]
        # Another certificate, and it joins nobody: the first node finds it again where it was.
        with PeerNode(identity=two.identity, port=two.port).start() as again:
            all_see([one, again])
            one.links.check(two.peer, 2.0)  # as whoever calls it does after a failure
            assert one.links.to(two.peer).pin.sha256 == again.sha256


def test_a_peer_that_left_is_told_from_one_that_died() -> None:
    with (
        PeerNode().start() as one,
        PeerNode([one.address]).start() as two,
        PeerNode([one.address]).start() as three,
    ):
        all_see([one, two, three])
        two.leave()
        eventually(lambda: believed(one, two) is State.LEFT)
        eventually(lambda: believed(three, two) is State.LEFT)
        assert live(one) == {one.peer, three.peer}
        states = {status.peer_id: status.state for status in one.peers.status()}
        assert states[two.peer] == "left"


def test_a_peer_that_comes_back_elsewhere_is_found_by_its_record() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        two.stop()
        with PeerNode([one.address], identity=two.identity).start() as again:
            all_see([one, again])
            assert one.peers.view(MODEL).records[two.peer].address == again.address
            assert one.links.to(two.peer).address == again.address


def test_what_a_node_publishes_later_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.issuer.RECORD_GAP_S", 0.1)
    assert RECORD_GAP_S == 10.0
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        two.peers.roster.publish([Held(MODEL, experts={1: 0b11})])
        eventually(lambda: one.peers.view(MODEL).records[two.peer].experts == {1: 0b11})


def test_a_peer_that_never_answers_delays_nobody_else() -> None:
    """One listens and says nothing, as a frozen process does."""
    with socket.create_server(("127.0.0.1", 0)) as frozen, PeerNode().start() as one:
        silent = f"127.0.0.1:{frozen.getsockname()[1]}"
        with PeerNode([silent, one.address]).start() as two:
            began = time.monotonic()
            all_see([one, two])
            assert time.monotonic() - began < 4.0


def test_two_networks_do_not_mix() -> None:
    with (
        PeerNode().start() as one,
        PeerNode([one.address], network=open_network("another")).start() as stranger,
        PeerNode([one.address]).start() as two,
    ):
        all_see([one, two])
        eventually(lambda: "network" in seed_of(stranger).why)
        assert live(stranger) == {stranger.peer}
        assert one.peers.roster.record_of(stranger.peer) is None


def test_in_a_permissioned_network_a_node_without_a_grant_is_nobodys_peer() -> None:
    operator = Identity.create()
    network = permissioned(operator.public_key)
    now_ms = int(time.time() * 1000)

    def granted(identity: Identity) -> bytes:
        return grants.sign(Grant(identity.peer, now_ms, now_ms + 3_600_000), operator)

    a, b = Identity.create(), Identity.create()
    with (
        PeerNode(identity=a, network=network, grant=granted(a)).start() as one,
        PeerNode([one.address], identity=b, network=network, grant=granted(b)).start() as two,
        PeerNode() as outsider,
    ):
        all_see([one, two])
        link = connect(outsider.identity, one.address)
        request = pb.SyncRequest(network=network.id)
        signed = outsider.peers.roster.signed_of(outsider.peer)
        assert signed is not None
        request.records.append(signed)
        with pytest.raises(WrongNetwork):
            link.call(lambda channel: PeersStub(channel).Sync, request, timeout_s=5.0)
        link.close()
        with pytest.raises(GrantMissing):
            PeerNode(network=network).stop()


def test_a_node_that_nobody_can_call_says_so_and_offers_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("node.issuer.RECORD_GAP_S", 0.1)
    monkeypatch.setattr("node.peers_service.DIAL_BACK_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        closed = f"127.0.0.1:{reserved.getsockname()[1]}"
    with PeerNode().start() as one, PeerNode([one.address], advertise=closed).start() as hidden:
        eventually(lambda: hidden.peers.gossip.reachable.refuted(time.monotonic()) is not None)
        assert closed in (hidden.peers.gossip.reachable.refuted(time.monotonic()) or "")
        eventually(lambda: hidden.peers.called_at == "")
        assert len(hidden.peers.view(MODEL).records[one.peer].layers) == 2  # its stages it can still call
        assert len(hidden.peers.view(MODEL).records[hidden.peer].layers) == 2  # its own clients it serves all the same
        eventually(lambda: (record := one.peers.roster.record_of(hidden.peer)) is not None and not record.held)
        assert live(one) == {one.peer}
    said = capsys.readouterr()
    assert "door only" in said.out + said.err


def test_a_node_that_can_be_called_again_offers_what_it_holds_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.issuer.RECORD_GAP_S", 0.1)
    monkeypatch.setattr("node.reachable.ASK_AGAIN_S", 0.1)
    monkeypatch.setattr("node.reachable.ASKED_S", 0.1)
    with PeerNode().start() as one, PeerNode([one.address]) as two:
        honest = one.service._unreached
        one.service._unreached = lambda *_: "the port is closed"
        two.start()
        eventually(lambda: two.peers.unreached == "the port is closed")
        eventually(lambda: (record := one.peers.roster.record_of(two.peer)) is not None and not record.held)
        one.service._unreached = honest
        one.service._dials.admit = lambda *_: True

        def is_offered_again() -> bool:
            two.peers.gossip._syncs.put(hash_of(one.peer))
            return two.peers.unreached == ""

        eventually(is_offered_again)
        all_see([one, two])


def test_only_the_callers_own_address_is_called_back_and_not_often() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two, PeerNode() as stranger:
        all_see([one, two])
        link = connect(stranger.identity, one.address)
        with pytest.raises(PermissionDenied):
            link.call(lambda channel: PeersStub(channel).DialBack, pb.DialBackRequest(), timeout_s=5.0)
        link.close()
        link = connect(two.identity, one.address)
        eventually(lambda: one.peer in two.peers.gossip.reachable._words)
        with pytest.raises(Overloaded):
            for _ in range(4):
                reply = link.call(lambda channel: PeersStub(channel).DialBack, pb.DialBackRequest(), timeout_s=10.0)
                assert (reply.address, reply.reached) == (two.address, True)
        link.close()


def test_so_many_are_called_back_at_once_and_no_more() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        eventually(lambda: one.peer in two.peers.gossip.reachable._words)
        service = one.service
        eventually(lambda: service._dialling._value == DIAL_BACKS_AT_ONCE_MAX)
        for _ in range(DIAL_BACKS_AT_ONCE_MAX):
            assert service._dialling.acquire(blocking=False)
        with pytest.raises(Overloaded, match=str(DIAL_BACKS_AT_ONCE_MAX)):
            service._dial_back(two.peer)


def test_the_record_of_a_node_and_of_its_peers_can_be_asked_for() -> None:
    with PeerNode().start() as one, PeerNode([one.address]).start() as two, PeerNode() as stranger:
        all_see([one, two])
        link = connect(stranger.identity, one.address)
        for asked, expected in (("", one.peer), (two.peer, two.peer)):
            signed = link.call(
                lambda channel: PeersStub(channel).Record, pb.RecordRequest(peer_id=asked), timeout_s=5.0
            )
            assert signed.SerializeToString() == one.peers.roster.signed_of(expected)
        with pytest.raises(PeerLost, match="no record"):
            link.call(lambda channel: PeersStub(channel).Record, pb.RecordRequest(peer_id="b" * 52), timeout_s=5.0)
        link.close()


def test_a_bug_in_a_push_pull_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = []

    def fail(_: object) -> None:
        failed.append(True)
        raise ZeroDivisionError

    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        monkeypatch.setattr(two.peers.gossip.push_pull, "begin", fail)

        def has_failed() -> bool:
            if not failed:  # one with the same peer may be under way still, and then this one is not begun
                two.peers.gossip._syncs.put(hash_of(one.peer))
            return bool(failed) and not two.peers.gossip._syncing

        eventually(has_failed)
        monkeypatch.undo()
        with PeerNode([one.address]).start() as three:
            all_see([one, two, three])
            assert believed(one, two) is State.ALIVE


def test_a_bug_in_the_service_is_told_as_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    with PeerNode() as one, PeerNode() as two:
        monkeypatch.setattr(one.peers.gossip.push_pull, "answer", lambda *_: 1 / 0)
        link = connect(two.identity, one.address)
        with pytest.raises(ShoalError, match="ZeroDivisionError") as error:
            link.call(lambda channel: PeersStub(channel).Sync, pb.SyncRequest(), timeout_s=5.0)
        assert error.value.code == "remote_error"
        link.close()


def test_a_push_pull_beyond_the_limit_is_refused() -> None:
    with PeerNode() as one, PeerNode() as two:
        link = connect(two.identity, one.address)
        request = pb.SyncRequest(records=[bytes(PEERS_MESSAGE_BYTES_MAX)])
        with pytest.raises(FrameTooLarge, match=str(PEERS_MESSAGE_BYTES_MAX)):
            link.call(lambda channel: PeersStub(channel).Sync, request, timeout_s=5.0)
        link.close()


def test_who_asks_for_push_pulls_without_end_is_held_back_alone() -> None:
    with PeerNode() as one, PeerNode() as two, PeerNode() as three:
        link, other = connect(two.identity, one.address), connect(three.identity, one.address)
        request = pb.SyncRequest(network=open_network().id)

        def ask(over: object) -> None:
            over.call(lambda channel: PeersStub(channel).Sync, request, timeout_s=5.0)

        with pytest.raises(Overloaded):
            for _ in range(int(4 * SYNC_BURST)):
                ask(link)
        ask(other)
        link.close()
        other.close()


def test_who_asks_in_many_names_from_one_host_is_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.peers_service.HOST_SYNC_BURST", 2.0)
    monkeypatch.setattr("node.peers_service.HOST_SYNC_PER_S", 0.001)
    with PeerNode() as one:
        for n in range(5):
            link = connect(Identity.create(), one.address)
            with pytest.raises(Overloaded, match=r"127\.0\.0\.1 asks") if n == 4 else contextlib.nullcontext():
                request = pb.SyncRequest(network=open_network().id)
                link.call(lambda channel: PeersStub(channel).Sync, request, timeout_s=5.0)
            link.close()


def test_of_more_callers_than_are_counted_the_one_heard_longest_ago_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert CALLERS_MAX == 4096
    monkeypatch.setattr("node.peers_service.CALLERS_MAX", 2)
    with PeerNode() as one, PeerNode() as two, PeerNode() as three, PeerNode() as four:
        links = [connect(each.identity, one.address) for each in (two, three, four)]
        request = pb.SyncRequest(network=open_network().id)
        for link in links:
            link.call(lambda channel: PeersStub(channel).Sync, request, timeout_s=5.0)
        assert list(one.service._syncs._buckets) == [three.peer, four.peer]
        for link in links:
            link.close()


def test_peers_and_sequences_of_the_last_run_are_remembered(tmp_path: Path) -> None:
    with PeerNode(folder=tmp_path).start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
        one.stop()
        assert (tmp_path / "node.marks").stat().st_mode & 0o777 == 0o600
        with PeerNode(identity=one.identity, folder=tmp_path).start() as again:
            all_see([again, two])
            assert two.peer in again.peers.roster.marks()


def test_nothing_is_left_when_nodes_end() -> None:
    before = threading.active_count()
    with PeerNode().start() as one, PeerNode([one.address]).start() as two:
        all_see([one, two])
    # trio keeps idle threads of its own for a few seconds.
    eventually(lambda: threading.active_count() <= before + 8)
