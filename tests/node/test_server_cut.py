"""A peer that is put out keeps no stream, and begins none."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from toy_streams import held_open

from node.certificate import Certificate
from node.config import Config
from node.hello import Callers
from node.identity import Identity
from node.link import Lane, Link, connect
from node.peers_service import PeersService
from node.server import Pools, Server, _PeerStreams
from protos.errors import PermissionDenied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from node.hello import Caller

WAIT_S = 20.0
COMPUTE = "/shoal.v1.Expert/Compute"


class Echo:
    """A node that gives back what it is sent, for as long as somebody is there."""

    def __init__(self) -> None:
        self.identity = Identity.create()
        self.put_out: set[str] = set()
        certificate = Certificate.make(time.time())
        config = Config(port=0)
        callers = Callers(self.identity, certificate.sha256)
        self.server = Server(config, Pools(config), callers, certificate, self._permit)
        nobody: Any = None
        self.server.start([self, PeersService(callers, nobody, nobody, self.identity)])
        self.address = f"127.0.0.1:{self.server.port}"

    def add_to(self, server: grpc.Server) -> None:
        handler = grpc.stream_stream_rpc_method_handler(lambda requests, _: requests)
        server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("shoal.v1.Expert", {"Compute": handler}),)
        )

    def _permit(self, caller: Caller, method: str) -> None:
        if method == COMPUTE and caller.peer in self.put_out:
            raise PermissionDenied("not of this network")


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.server.stop(0)


@contextlib.contextmanager
def linked(echo: Echo) -> Iterator[tuple[Identity, Link]]:
    identity = Identity.create()
    link = connect(identity, echo.address)
    yield identity, link
    link.close()


def compute(link: Link) -> Any:
    """A stream with one message that has come back."""
    return held_open(link, Lane.EXPERTS, COMPUTE, b"rows")


def test_the_open_streams_of_a_peer_that_is_put_out_end_and_those_of_others_go_on(echo: Echo) -> None:
    with linked(echo) as (revoked, link), linked(echo) as (_, other):
        first, second = compute(link), compute(other)
        assert (next(first), next(second)) == (b"rows", b"rows")
        echo.put_out.add(revoked.peer)
        echo.server.cut(revoked.peer)
        with pytest.raises(grpc.RpcError) as ended:
            next(first)
        assert ended.value.code() is grpc.StatusCode.CANCELLED
        assert second.is_active()
        with pytest.raises(grpc.RpcError) as refused:
            next(compute(link))
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        second.cancel()


def test_who_is_put_out_while_its_stream_begins_has_none(echo: Echo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first look and the moment from which the stream can be cut."""
    add = _PeerStreams.add

    def late(streams: _PeerStreams, context: grpc.ServicerContext, method: str) -> None:
        echo.put_out.add(identity.peer)
        echo.server.cut(identity.peer)
        add(streams, context, method)

    monkeypatch.setattr(_PeerStreams, "add", late)
    with linked(echo) as (identity, link):
        with pytest.raises(grpc.RpcError) as ended:
            next(compute(link))
        assert ended.value.code() is grpc.StatusCode.CANCELLED
