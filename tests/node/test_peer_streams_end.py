"""A node that leaves cuts other nodes' streams at once; the time that it gives is for answers."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from node import config
from node.certificate import Certificate
from node.hello import Callers
from node.identity import Identity
from node.link import Lane, connect
from node.peers_service import PeersService
from node.server import Pools, Server
from node.status import from_rpc
from protos.errors import Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

GRACE_S = 20.0


class Endless:
    """A method like Steps, Deliver and Compute, in a pool of its own: it answers what it hears, for ever."""

    def __init__(self, pools: Pools) -> None:
        self.threads: list[str] = []
        self.ended = threading.Event()
        self._pool = pools.experts

    def add_to(self, server: grpc.Server) -> None:
        handlers = {"Stream": grpc.stream_stream_rpc_method_handler(_InPool(self, self._pool))}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("toy", handlers),))

    def handle(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(self.ended.set)
        self.threads.append(threading.current_thread().name)
        yield from requests


class _InPool:
    def __init__(self, endless: Endless, pool: object) -> None:
        self._endless = endless
        self.experimental_thread_pool = pool

    def __call__(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        return self._endless.handle(requests, context)


def test_leaving_does_not_wait_for_streams_that_never_end() -> None:
    settings = config.load({"port": 0})
    identity, certificate = Identity.create(), Certificate.make(time.time())
    callers = Callers(identity, certificate.sha256)
    pools = Pools(settings)
    server = Server(settings, pools, callers, certificate)
    endless = Endless(pools)
    nobody: Any = None  # exchanges records here
    server.start([endless, PeersService(callers, nobody, nobody, identity)])
    link = connect(Identity.create(), f"127.0.0.1:{server.port}", timeout_s=GRACE_S)
    sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    invoke = link.channel(Lane.EXPERTS).stream_stream("/toy/Stream")
    stream = invoke(iter(sent.get, None), metadata=link.metadata(), timeout=GRACE_S * 2)
    sent.put(b"first")
    assert next(stream) == b"first"
    began = time.monotonic()
    server.stop(GRACE_S)
    assert time.monotonic() - began < GRACE_S / 2
    with pytest.raises(grpc.RpcError) as cut:
        next(stream)
    assert isinstance(from_rpc(cut.value, "the node"), Unavailable)
    assert endless.ended.wait(GRACE_S)
    assert endless.threads[0].startswith("shoal-calls-experts")
    sent.put(None)
    link.close()
