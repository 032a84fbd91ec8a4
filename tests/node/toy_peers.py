"""Nodes that only know each other: TLS, Hello, push-pulls over real gRPC and real datagrams on loopback, no model."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import trio

from coordinator.health import PeerHealth
from node.certificate import Certificate
from node.hello import Authentication, Callers
from node.identity import Identity
from node.intake import Intake
from node.link import SERVER_OPTIONS, Links, server_credentials
from node.network import Network, open_network
from node.peers import About, Peers, Places
from node.peers_service import PeersService
from node.profile import LAN, scaled
from node.record import Held
from node.udp import Udp
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from node.hello import Caller

MODEL = "a" * 64


class PeerNode:
    """Listens from construction on; gossips from `start` on, in a thread of its own."""

    def __init__(
        self,
        join: Sequence[str] = (),
        *,
        identity: Identity | None = None,
        port: int = 0,
        certificate: Certificate | None = None,
        plaintext: bool = False,
        permit: bool = False,
        network: Network | None = None,
        grant: bytes = b"",
        folder: Path | None = None,
        advertise: str = "",
        probe_period_s: float = 0.1,
        held: Sequence[Held] = (Held(MODEL, span=range(2), embed=True, head=True, experts={0: 5, 1: 5}),),
    ) -> None:
        self.identity = identity or Identity.create()
        self.peer = self.identity.peer
        self.certificate = None if plaintext else certificate or Certificate.make(time.time())
        self.sha256 = self.certificate.sha256 if self.certificate else None
        self.callers = Callers(self.identity, self.sha256)
        self.pool = ThreadPoolExecutor(4)
        self._intake = Intake()
        self._intake.start()
        self.server = grpc.server(
            self.pool,
            options=SERVER_OPTIONS,
            interceptors=[Authentication(self.callers, permit=self._permit), self._intake],
        )
        self.udp = Udp("127.0.0.1", port)
        self.port = self._bind(f"127.0.0.1:{self.udp.port}")
        self.address = f"127.0.0.1:{self.port}"
        self.links = Links(self.identity, plaintext=plaintext, timeout_s=5.0)
        about = About(advertise or self.address, self.sha256, zone="here", grant=grant)
        places = Places(join)
        if folder is not None:
            places = Places(join, peers_file=folder / "node.peers", marks_file=folder / "node.marks")
        try:
            self.peers = Peers(
                self.identity,
                network or open_network(),
                self.links,
                self.udp,
                PeerHealth(),
                about,
                held,
                places=places,
                profile=scaled(LAN, probe_period_s),
            )
        except ShoalError:
            self.udp.close()
            self.pool.shutdown()
            raise
        self._permits = permit
        self.service = PeersService(
            self.callers, self.peers.roster, self.peers.gossip, self.identity, plaintext=plaintext
        )
        self.service.add_to(self.server)
        self.server.start()
        self._thread: threading.Thread | None = None

    def _permit(self, caller: Caller, method: str) -> None:
        if self._permits:
            self.peers.permit(caller, method)

    def _bind(self, address: str) -> int:
        if self.certificate is None:
            return self.server.add_insecure_port(address)
        return self.server.add_secure_port(address, server_credentials(self.certificate))

    def start(self) -> PeerNode:
        """Takes part from now on."""
        started = threading.Event()

        async def main() -> None:
            self._token = trio.lowlevel.current_trio_token()
            with trio.CancelScope() as self._scope:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.peers.run)
                    started.set()

        self._thread = threading.Thread(target=trio.run, args=(main,))
        self._thread.start()
        assert started.wait(20)
        return self

    def leave(self) -> None:
        """As a node that is ended: it says good-bye first."""
        trio.from_thread.run(self.peers.leave, trio_token=self._token)
        self.stop()

    def stop(self) -> None:
        """As a killed process: nothing is said to anybody.  May be repeated."""
        if self._thread is not None:
            self._token.run_sync_soon(self._scope.cancel)
            self._thread.join(20)
            self._thread = None
        self.links.close()
        self.udp.close()
        self.server.stop(None).wait(20)
        self._intake.close()
        self.pool.shutdown(wait=True)

    def __enter__(self) -> PeerNode:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def eventually(holds) -> None:
    """Waits for what another thread does, without a clock of our own deciding how fast it must be."""
    waiting = threading.Event()
    for _ in range(4000):
        if holds():
            return
        waiting.wait(0.005)
    raise AssertionError("it never came to hold")
