"""Discovery: finds other nodes and keeps finding them.  The trio driver over Contacts.  PROTOCOL.md, "Discovery".

Law: nothing that fails here ends the node, and whoever is alone goes on looking.
"""

from __future__ import annotations

import math
import random
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from node import log, remembered, seeds
from node.bridge import Inbox, in_thread
from node.contact import (
    Alone,
    Contact,
    Event,
    Failed,
    Failing,
    Found,
    Known,
    Reached,
    Resolve,
    Resolved,
    Source,
    Tick,
    Try,
    Unresolved,
)
from node.contacts import Contacts
from node.lan import Lan
from protos.errors import BrokenInvariant, DeadlineExceeded, InvalidRequest, RemoteError, ShoalError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from pathlib import Path

    from node.contact import Effect, Status
    from node.lan import Announcement
    from node.remembered import Remembered
    from protos.ids import PeerId

    Dial = Callable[[str], Awaitable[PeerId]]
    KnownPeers = Callable[[], Mapping[PeerId, str]]

KNOWN_S = 1.0
"""How often it is asked who is known, where nobody says that this has changed."""

DIAL_S_MAX = 20.0
"""A dial that takes longer has failed, whatever its own deadlines are."""

REMEMBER_S = 60.0
"""Between two writings of the peers file: so many seconds of peers a node that is killed forgets."""


@dataclass(frozen=True, slots=True)
class Ways:
    """Where to look.  No `announcement`: the LAN is neither searched nor told.  No `peers_file`: nothing is kept."""

    me: PeerId
    network: bytes
    seeds: Sequence[str] = ()
    announcement: Announcement | None = None
    peers_file: Path | None = None


class Discovery:
    """`run` it.  The functions are called in trio.

    dial: exchanges records with the node at host:port[#PEERID], and gives who proved to be there, or raises ShoalError.
    known: the peers that are known and not dead, and the address of each.
    answering: those of them that are worth remembering, since they answered there.  Without it all are.
    """

    def __init__(self, ways: Ways, dial: Dial, known: KnownPeers, answering: KnownPeers | None = None) -> None:
        self._ways = ways
        self._dial = dial
        self._known = known
        self._answering = answering or known
        self._random = random.Random()  # noqa: S311  (for whom to try when, and whom to remember)
        self._contacts = Contacts(
            ways.me,
            self._random,
            time.monotonic(),
            searching=ways.announcement is not None,
        )
        self._lock = threading.Lock()
        self._last: frozenset[PeerId] = frozenset()
        self._seen: list[Remembered] = []
        self._looked_at = -math.inf
        self._hint: Inbox[None] | None = None

    def wake(self) -> None:
        """From any thread: who is known has changed.  It would be noticed within KNOWN_S otherwise."""
        if self._hint is not None:
            self._hint.put(None)

    def status(self) -> list[Status]:
        """From any thread: what is known of each address, for `shoal peers`."""
        with self._lock:
            return self._contacts.status(time.monotonic())

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Looks for nodes until it is cancelled; then the announcement is withdrawn and the peers are written down."""
        self._hint = Inbox(1)
        news, events = trio.open_memory_channel[Event](0)
        try:
            async with trio.open_nursery() as nursery:
                task_status.started()
                nursery.start_soon(self._hints, self._hint, news.clone())
                if self._ways.announcement is not None:
                    nursery.start_soon(Lan(self._ways.announcement).run, news.clone())
                for event in [*self._given(), *await self._recalled()]:
                    self._handle(event, nursery, news)
                if self._ways.peers_file is not None:
                    nursery.start_soon(self._remember_for_ever)
                await self._loop(events, nursery, news)
        finally:
            with trio.CancelScope(shield=True):
                await self._remember()

    async def _loop(
        self, events: trio.MemoryReceiveChannel[Event], nursery: trio.Nursery, news: trio.MemorySendChannel[Event]
    ) -> None:
        while True:
            deadline = self._contacts.deadline
            due_s = KNOWN_S if deadline is None else max(0.0, min(deadline - time.monotonic(), KNOWN_S))
            event: Event = Tick()
            with trio.move_on_after(due_s):
                event = await events.receive()
            # It goes through all peers: not for each thing that somebody on the LAN says.
            if isinstance(event, Reached) or time.monotonic() - self._looked_at >= KNOWN_S:
                self._look_at_known(nursery, news)
            self._handle(event, nursery, news)

    def _look_at_known(self, nursery: trio.Nursery, news: trio.MemorySendChannel[Event]) -> None:
        self._looked_at = time.monotonic()
        peers = frozenset(self._known())
        if peers != self._last:
            self._last = peers
            self._handle(Known(peers), nursery, news)

    def _handle(self, event: Event, nursery: trio.Nursery, news: trio.MemorySendChannel[Event]) -> None:
        try:
            with self._lock:
                effects = self._contacts.handle(event, time.monotonic())
        except InvalidRequest as error:
            log.get("discovery").warning("a seed is no address of a node", error=error.message)
            return
        for effect in effects:
            self._do(effect, nursery, news)

    def _do(self, effect: Effect, nursery: trio.Nursery, news: trio.MemorySendChannel[Event]) -> None:
        match effect:
            case Try(contact):
                nursery.start_soon(self._try, contact, news)
            case Resolve(seed):
                nursery.start_soon(self._resolve, seed, news)
            case Failing(source, address, why):
                logger = log.get("discovery")
                # A person gave the seeds, and can put them right; others come and go.
                tell = logger.warning if source is Source.SEED else logger.debug
                tell("cannot join", address=address, error=why)
            case Alone(for_s, contacts):
                log.get("discovery").warning(
                    "no other node is known; looking on", for_s=round(for_s), addresses=contacts, **self._hope()
                )

    def _hope(self) -> dict[str, str]:
        searched = self._ways.announcement is not None
        advice = {} if self._ways.seeds else {"advice": "give a node of the network with --join"}
        return {"lan": "searched" if searched else "not searched: --lan on searches it", **advice}

    async def _try(self, contact: Contact, news: trio.MemorySendChannel[Event]) -> None:
        await news.send(await self._tried(contact))

    async def _tried(self, contact: Contact) -> Event:
        try:
            with trio.fail_after(DIAL_S_MAX):
                return Reached(contact, await self._dial(contact.address))
        except ShoalError as error:
            return Failed(contact, f"{error.code}: {error.message}", isinstance(error, RemoteError))
        except trio.TooSlowError:
            return Failed(contact, f"{DeadlineExceeded.code}: nobody answered within {DIAL_S_MAX:g} s")
        except Exception as error:  # noqa: BLE001  (a bug that a peer can reach must not end the node; it is told)
            log.get("discovery").exception("a try failed", address=contact.address, error=str(error))
            return Failed(contact, f"{BrokenInvariant.code}: it failed here: {type(error).__name__}", lasting=True)

    async def _resolve(self, seed: str, news: trio.MemorySendChannel[Event]) -> None:
        try:
            event: Event = Resolved(seed, await seeds.resolve(seed))
        except ShoalError as error:
            event = Unresolved(seed, f"{error.code}: {error.message}")
        await news.send(event)

    async def _hints(self, hint: Inbox[None], news: trio.MemorySendChannel[Event]) -> None:
        while True:
            await hint.get()
            self._looked_at = -math.inf
            await news.send(Tick())

    def _given(self) -> list[Event]:
        return [Found(Source.SEED, seed) for seed in self._ways.seeds]

    async def _recalled(self) -> list[Event]:
        """Those of the last run, newest first."""
        path = self._ways.peers_file
        if path is None:
            return []
        try:
            peers = await in_thread(partial(remembered.load, path, self._ways.network, time.time()))
        except InvalidRequest as error:
            log.get("discovery").warning("peers of the last run are forgotten", error=error.message)
            return []
        self._seen = peers
        return [Found(Source.REMEMBERED, f"{each.address}#{each.peer}") for each in peers if each.peer != self._ways.me]

    async def _remember_for_ever(self) -> None:
        while True:
            await trio.sleep(REMEMBER_S)
            await self._remember()

    async def _remember(self) -> None:
        path = self._ways.peers_file
        if path is None:
            return
        now = int(time.time())
        answering = {peer: at for peer, at in self._answering().items() if peer != self._ways.me}
        peers = self._seen = remembered.renewed(self._seen, answering, now, self._random)
        if not peers:
            return
        try:
            await in_thread(partial(remembered.save, path, self._ways.network, peers, now))
        except OSError as error:
            log.get("discovery").warning("peers are not remembered", path=str(path), error=str(error))
