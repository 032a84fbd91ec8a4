"""What a node has before it has a model: its key, its network, a port, and ways to other nodes.

Law: whatever can be refused of these is refused here, before torch is loaded, which takes seconds; and two nodes are
never one peer.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final, Self

from coordinator.dispatch import Dispatch
from coordinator.health import PeerHealth
from node import identity, operator_files
from node.certificate import Certificate
from node.hello import Callers
from node.identity import Identity
from node.link import Links
from node.server import Pools, Server
from node.udp import Udp
from protos.errors import InvalidRequest, PortInUse

if TYPE_CHECKING:
    from node.config import Config
    from node.expert_port import ExpertPort
    from node.hello import Caller
    from node.network import Network
    from node.peers import Peers
    from protos.manifest import Manifest
    from shard.experts import ExpertBank

# A free port for calls may be taken for datagrams, and the other way round.
PORT_TRIES: Final = 16


class Wire:
    """Bound from construction on.  `peers` and `experts` come with the model."""

    def __init__(self, config: Config) -> None:
        """Blocks.  Raises PortInUse, what operator_files.admission does, and InvalidRequest: a key file that cannot be
        used or is in use, an address that is not this machine's, a list that is not there."""
        self._config = config
        with contextlib.ExitStack() as held:
            lock = held.enter_context(contextlib.ExitStack())  # of the key: taken last, given back last
            self.identity = Identity.load_or_create(config.identity)
            self.me = self.identity.peer
            self.certificate = None if config.plaintext else Certificate.make(time.time())
            self.sha256 = self.certificate.sha256 if self.certificate else None
            self.callers = Callers(self.identity, self.sha256)
            self.health = PeerHealth()
            self.peers: Peers | None = None
            self.experts: ExpertPort | None = None
            self.pools = Pools(config)
            self.admission = operator_files.admission(config.network, config.grant, self.me, time.time())
            _check_revocations(config, self.admission.network)
            known_only = self.admission.network.permissioned
            self.links = Links(self.identity, plaintext=config.plaintext, known_only=known_only)
            held.callback(self.links.close)
            self.server, self.udp = self._bound()
            held.callback(self.udp.close)
            held.callback(self.server.stop, 0)
            lock.enter_context(identity.taken(config.identity))  # who starts a node twice hears of its port first
            self.address = config.advertise or _address(config.host, self.server.port)
            self._held = held.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def port(self, manifest: Manifest, bank: ExpertBank) -> ExpertPort:
        """What the stage asks for experts."""
        from node.expert_port import ExpertPort  # which needs torch

        self.experts = ExpertPort(
            manifest,
            bank,
            Dispatch(self.me, manifest.experts),
            self.health,
            self.links,
            lambda: self._known().view(manifest.model_id),
            me=self.me,
            expert_wait_s=self._config.expert_wait_s,
        )
        return self.experts

    def leave(self) -> None:
        if self.experts is not None:
            self.experts.close()

    def close(self) -> None:
        """May be called again."""
        self._held.close()

    def _bound(self) -> tuple[Server, Udp]:
        """Calls and datagrams on one port number.  Raises PortInUse, InvalidRequest."""
        for tries_left in reversed(range(1 if self._config.port else PORT_TRIES)):
            udp = Udp(self._config.host, self._config.port)
            try:
                permit = self._permit
                return Server(self._config, self.pools, self.callers, self.certificate, permit, udp.port), udp
            except PortInUse:
                udp.close()
                if not tries_left:
                    raise
        raise AssertionError("the last try returned or raised")

    def _permit(self, caller: Caller, method: str) -> None:
        self._known().permit(caller, method)

    def _known(self) -> Peers:
        assert self.peers is not None, "calls are taken, and layers computed, once peers are known"
        return self.peers


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_revocations(config: Config, network: Network) -> None:
    """Raises InvalidRequest: what a person wants to be in force must not be missing in silence."""
    if config.revocations is None:
        return
    if not network.permissioned:
        raise InvalidRequest(
            f"revocations is {config.revocations}, but network {network} is open and takes no grant back: leave it out"
        )
    if not config.revocations.expanduser().is_file():
        raise InvalidRequest(f"there is no revocation list {config.revocations}: 'shoal network revoke' writes one")
