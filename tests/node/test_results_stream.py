"""A stream of results as a whole node's server serves it: cut with its peer, and refused by what it says."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from toy_streams import held_open
from toy_swarm import eventually, manifest

from node.certificate import Certificate
from node.config import Config
from node.hello import Callers, caller_of
from node.identity import Identity
from node.link import Lane, Link, Links, connect
from node.mail import Mail
from node.peers_service import PeersService
from node.server import Pools, Server
from node.stage_host import StageHost
from node.stage_service import Lanes, StageServices
from node.status import from_rpc
from protos.errors import RemoteError
from protos.stage_pb2 import DeliverRefusal, Peer

if TYPE_CHECKING:
    from collections.abc import Iterator


class Staged:
    """A node with the stage's services alone."""

    def __init__(self) -> None:
        identity, certificate, config = Identity.create(), Certificate.make(time.time()), Config(port=0)
        callers, pools = Callers(identity, certificate.sha256), Pools(config)
        self.server = Server(config, pools, callers, certificate, lambda _, __: None)
        me = Peer(peer_id=identity.peer, address="127.0.0.1:1")
        self.host = StageHost(me, manifest(), None, range(0), Links(identity))
        lanes = Lanes(pools.steps, pools.stage, config.step_streams_max)
        self.services = StageServices(self.host, Mail(), lanes, lambda context: caller_of(context).peer)
        nobody: Any = None
        self.server.start([self.services, PeersService(callers, nobody, nobody, identity)])
        self.caller = Identity.create()
        self.link: Link = connect(self.caller, f"127.0.0.1:{self.server.port}")


@pytest.fixture
def staged() -> Iterator[Staged]:
    made = Staged()
    yield made
    made.link.close()
    made.server.stop(0)


def come(link: Link, *said: bytes) -> Any:
    """A door that comes for its results, says this, and then nothing."""
    return held_open(link, Lane.STEPS, "/shoal.v1.Stage/Results", *said)


def test_a_door_that_is_put_out_gets_no_more_results_and_nothing_of_it_stays(staged: Staged) -> None:
    call = come(staged.link)
    eventually(lambda: staged.services.streams == 1)
    staged.server.cut(staged.caller.peer)
    with pytest.raises(grpc.RpcError) as ended:
        next(call)
    assert ended.value.code() is grpc.StatusCode.CANCELLED
    eventually(lambda: staged.services.streams == 0)
    assert staged.host._deliveries._pickups == {}


def test_a_message_that_cannot_be_read_ends_the_stream_with_that_error(
    staged: Staged, monkeypatch: pytest.MonkeyPatch
) -> None:
    uncaught: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", uncaught.append)
    call = come(staged.link, b"\xff\xff\xff")
    with pytest.raises(grpc.RpcError) as ended:
        next(call)
    assert from_rpc(ended.value, "").code == "invalid_request"
    eventually(lambda: staged.services.streams == 0)
    assert uncaught == []


def test_a_bug_in_what_hears_refusals_is_told_as_one(staged: Staged, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(staged.host, "refused", fails)
    call = come(staged.link, DeliverRefusal(session_id="s").SerializeToString())
    with pytest.raises(grpc.RpcError) as ended:
        next(call)
    assert from_rpc(ended.value, "").code == RemoteError.code
