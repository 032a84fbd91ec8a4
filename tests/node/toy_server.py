"""A toy node that listens: trio in a thread of its own, gRPC with TLS and Hello on loopback."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Any

import trio
from toy_node import ToyWorker, door

from node.bridge import Portal, in_thread
from node.certificate import Certificate
from node.hello import Callers
from node.identity import Identity
from node.inference_service import Clients, InferenceService
from node.link import Lane
from node.peers_service import PeersService
from node.server import Pools, Server
from protos import inference_pb2 as pb
from protos.errors import ShuttingDown

if TYPE_CHECKING:
    import grpc

    from node.client import Client


class Node:
    """A toy node whose trio runs in a thread of its own."""

    def __init__(self, files: dict[str, bytes] | None = None, **settings: object) -> None:
        self.worker = ToyWorker()
        self.files = files
        self.settings = {"port": 0, **settings}
        self.identity = Identity.create()
        self.address = ""
        self.error: BaseException | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001
            self.error = error
            self._up.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._leave = trio.Event()
        async with trio.open_nursery() as nursery:
            self.door = door(self.worker, self.files, **self.settings)
            certificate = self.certificate = Certificate.make(time.time())
            callers = Callers(self.identity, certificate.sha256)
            self.pools = Pools(self.door.config)
            server = Server(self.door.config, self.pools, callers, certificate)
            portal = Portal(nursery, lambda: ShuttingDown("leaving"))
            inference = self.inference = InferenceService(
                self.door,
                portal,
                Clients(self.door.config.clients),
                self.pools.clients,
                lambda: self.worker.kv_bytes,
                lambda: pb.PeersReply(peer_id=self.identity.peer),
            )
            nobody: Any = None  # exchanges records here
            server.start([inference, PeersService(callers, nobody, nobody, self.identity)])
            self.address = f"127.0.0.1:{server.port}"
            self._up.set()
            await self._leave.wait()
            self.door.leave()
            await in_thread(lambda: server.stop(5.0))
            portal.close()
            await in_thread(self.door.shutdown)
            nursery.cancel_scope.cancel()

    def leave(self) -> None:
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._leave.set)

    def __enter__(self) -> Node:
        self._thread.start()
        assert self._up.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        if self.error is None:
            self.leave()
        self._thread.join(20)
        assert not self._thread.is_alive()


def raw(client: Client) -> tuple[grpc.Channel, tuple[tuple[str, str], ...]]:
    """What a client's own checks would not let through: its channel, and the token that calls need."""
    client.info()
    assert client._link is not None
    return client._link.channel(Lane.CLIENTS), client._link.metadata()
