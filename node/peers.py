"""Peers: a node's part in its network: the roster of who is there, gossip that keeps it, discovery of contacts.

Law: what happens here is told in the log and in `status`, and ends no node; a node that nobody can call says so, and
lets nobody rely on what it holds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from coordinator.view import Load
from node import lan, log, marks_file
from node.bridge import in_thread
from node.discovery import Discovery, Ways
from node.gossip import Gossip
from node.profile import LAN, Profile
from node.revocations_file import RevocationsFile
from node.roster import About, Roster
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from coordinator.health import PeerHealth
    from coordinator.view import View
    from node.contact import Status
    from node.hello import Caller
    from node.identity import Identity
    from node.link import Links
    from node.marks import Mark
    from node.network import Network
    from node.record import Held
    from node.udp import Udp
    from protos import inference_pb2
    from protos.ids import PeerId

__all__ = ["About", "Peers", "Places"]

MARKS_S = 60.0
"""Between two writings of the high-water marks: so many seconds of them a node that is killed forgets."""

LOOK_S = 1.0
"""How often it is looked at whether others reach this node."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where to look for others, and where to keep what must survive a restart.  Paths None: nothing is kept."""

    join: Sequence[str] = ()
    lan_host: str = ""  # the host that the node listens on; empty: the LAN is not searched
    advertise: str = ""
    peers_file: Path | None = None
    marks_file: Path | None = None
    operators_list: Path | None = None  # of revocations, read whenever it changes
    revocations_file: Path | None = None  # this node's copy of the list in force


class Peers:
    """`run` it after the server has started.  `load`: how busy this node is."""

    def __init__(
        self,
        identity: Identity,
        network: Network,
        links: Links,
        udp: Udp,
        health: PeerHealth,
        about: About,
        held: Sequence[Held] = (),
        *,
        places: Places | None = None,
        profile: Profile = LAN,
        load: Callable[[], Load] = Load,
    ) -> None:
        """Raises as Roster."""
        self._places = places = places or Places()
        self._withheld = False
        self.roster = Roster(
            identity,
            network,
            links,
            health,
            about,
            held,
            marks=_marks(self._places.marks_file),
            load=load,
        )
        self._copy = _file(places.revocations_file)
        self._operators_list = _file(places.operators_list)
        self._look_at_lists()
        self.gossip = Gossip(self.roster, identity, links, udp, profile=profile)
        self.discovery = Discovery(
            self._ways(identity, network, udp.port), self.gossip.join, self.roster.not_dead, self.roster.answering
        )

    @property
    def me(self) -> PeerId:
        return self.roster.me

    @property
    def address(self) -> str:
        return self.roster.address

    @property
    def called_at(self) -> str:
        """Where others call this node; empty: nobody can, as far as is known."""
        return "" if self._withheld else self.roster.address

    def view(self, model_id: str) -> View:
        """See Roster.view."""
        return self.roster.view(model_id)

    def status(self, size: Callable[[Held], int] = lambda _: 0) -> list[inference_pb2.PeerStatus]:
        """See Roster.status."""
        return self.roster.status(size)

    def contacts(self) -> list[Status]:
        """Where other nodes are looked for, and what came of it."""
        return self.discovery.status()

    @property
    def unreached(self) -> str:
        """Why no other node can call this one, or takes it for one; empty: nothing speaks against it."""
        return self.roster.refused or self.gossip.reachable.refuted(time.monotonic()) or ""

    def counts(self) -> Mapping[str, int]:
        """What gossip came to since the start: datagrams, bytes, push-pulls, and what was refused."""
        return dict(self.gossip.counts)

    def permit(self, caller: Caller, method: str) -> None:
        """See Roster.permit."""
        self.roster.permit(caller, method)

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        """A call to the peer failed."""
        self.gossip.failed(peer, error)

    def heard(self, peer: PeerId) -> None:
        """The peer gave a sign of life."""
        self.roster.heard(peer)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Takes part until it is cancelled; then what must survive a restart is written down."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.gossip.run)
                await nursery.start(self.discovery.run)
                nursery.start_soon(self._watch_reach)
                nursery.start_soon(self._keep_marks)
                nursery.start_soon(self._watch_lists)
                task_status.started()
        finally:
            with trio.CancelScope(shield=True):
                await self._save_marks()
                await in_thread(self._look_at_lists)

    async def leave(self) -> None:
        """Says good-bye.  What is held is no longer offered."""
        await self.gossip.leave()

    async def _watch_reach(self) -> None:
        while True:
            why = self.gossip.reachable.refuted(time.monotonic())
            if (why is not None) != self._withheld:
                self._withhold(why)
            await trio.sleep(LOOK_S)

    def _withhold(self, why: str | None) -> None:
        """Whoever routed through a node that cannot be called would only lose time."""
        self._withheld = why is not None
        self.roster.offer(why is None)
        self.gossip.set_deaf(why is not None)
        if why is None:
            log.get("peers").info("other nodes reach this one now: it serves what it holds", address=self.address)
        else:
            log.get("peers").warning(
                "other nodes cannot reach this one: it serves as a door only, and offers nothing that it holds",
                address=self.address,
                error=why,
                advice="open that port for TCP and UDP, or say with --advertise where this node is",
            )

    async def _keep_marks(self) -> None:
        while True:
            await trio.sleep(MARKS_S)
            await self._save_marks()

    async def _save_marks(self) -> None:
        path = self._places.marks_file
        if path is None:
            return
        try:
            await in_thread(partial(marks_file.save, path, self.roster.marks()))
        except OSError as error:
            log.get("peers").warning("sequences are not remembered", path=str(path), error=str(error))

    async def _watch_lists(self) -> None:
        while True:
            await trio.sleep(LOOK_S)
            await in_thread(self._look_at_lists)

    def _look_at_lists(self) -> None:
        """Takes the revocations in that lie in files, and keeps those in force for the next start."""
        for file in (self._copy, self._operators_list):
            try:
                data = None if file is None else file.news()
                if data is not None:
                    self.roster.merge_revocations(data)
            except ShoalError as error:
                log.get("peers").warning("a revocation list is refused", error=error.message)
        try:
            if self._copy is not None and self.roster.revocations:
                self._copy.keep(self.roster.revocations)
        except OSError as error:
            log.get("peers").warning("revocations are not remembered", error=str(error))

    def _ways(self, identity: Identity, network: Network, port: int) -> Ways:
        places = self._places
        announcement = None
        if places.lan_host:
            announcement = lan.announcement(network.id, identity.peer, places.lan_host, port, places.advertise)
        return Ways(identity.peer, network.id, places.join, announcement, places.peers_file)


def _file(path: Path | None) -> RevocationsFile | None:
    return None if path is None else RevocationsFile(path)


def _marks(path: Path | None) -> Mapping[PeerId, Mark]:
    if path is None:
        return {}
    loaded = marks_file.load(path)
    if loaded.problem is not None:
        log.get("peers").warning("high-water marks are lost", error=loaded.problem.message)
    return loaded.marks
