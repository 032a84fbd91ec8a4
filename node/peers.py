"""Peers: exchanges records with other nodes, all the time.  The trio driver over Roster.  PROTOCOL.md, section 14.

Law: every try has a deadline and runs in a thread of its own; one peer that does not answer delays nothing else.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from node import log
from node.bridge import Inbox, in_thread
from node.link import Links, connect
from node.reach import RETRY_S_MAX
from node.roster import About, Roster
from protos.errors import BrokenInvariant, PeerLost, RemoteError, ShoalError
from protos.peers_pb2_grpc import PeersStub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coordinator.health import PeerHealth
    from node.identity import Identity
    from node.link import Link
    from protos import peers_pb2 as pb
    from protos.ids import PeerId

__all__ = ["About", "Peers"]

EXCHANGE_S = 2.0
"""An exchange's deadline."""

TRIES_AT_ONCE_MAX = 8
"""Exchanges that run at the same time; each holds a thread for a few seconds at most."""

SEEDS_AT_ONCE_MAX = TRIES_AT_ONCE_MAX // 2
"""Of these, with addresses of the command line: those where nobody answers leave room for peers."""


@dataclass(slots=True)
class _Seed:
    """An address of the command line; `peer`: who answered there."""

    address: str
    peer: PeerId | None = None
    misses: int = 0
    retry_at: float = 0.0
    busy: bool = False
    told: str = ""  # the last failure that was logged: each is logged once


class Peers(Roster):
    """Roster says what is known (view, status, publish, failed, heard, permit); `run` keeps it so.

    join: addresses, each asked until the record of who answers there is known, and again when that peer is gone.
    """

    def __init__(
        self,
        identity: Identity,
        links: Links,
        health: PeerHealth,
        about: About,
        *,
        join: Sequence[str] = (),
        period_s: float = 1.0,
        load: Callable[[], pb.Load] | None = None,
    ) -> None:
        if load is None:
            super().__init__(identity, links, health, about, period_s=period_s)
        else:
            super().__init__(identity, links, health, about, period_s=period_s, load=load)
        self._seeds = [_Seed(address) for address in join]
        self._period_s = period_s
        self._random = random.Random()  # noqa: S311  (for whom to ask next)
        self._busy: set[PeerId] = set()
        self._news: Inbox[None] | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Exchanges records until it is cancelled; it never raises because of what a peer does."""
        self._news = Inbox(1)
        async with trio.open_nursery() as nursery:
            task_status.started()
            while True:
                self.tick()
                self._begin(nursery)
                # Spread, so that nodes that were started together do not stay in step.
                with trio.move_on_after(self._period_s * self._random.uniform(0.75, 1.25)):
                    await self._news.get()

    def failed(self, peer: PeerId, error: ShoalError) -> None:
        """A call to the peer failed: it is tried at once."""
        super().failed(peer, error)
        self._wake()

    def heard(self, peer: PeerId) -> None:
        """The peer gave a sign of life."""
        gone = self.is_dead(peer)
        super().heard(peer)
        if gone:
            self._wake()

    def admit(self, caller: PeerId, request: pb.ExchangeRequest) -> None:
        known = self.record_of(caller)
        super().admit(caller, request)
        if known is None:
            self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            self._news.put(None)

    def _begin(self, nursery: trio.Nursery) -> None:
        now = time.monotonic()
        for seed in sorted(self._seeds, key=lambda seed: seed.misses):
            if self._wants(seed, now) and self._seeds_busy() < SEEDS_AT_ONCE_MAX and self._room():
                seed.busy = True
                nursery.start_soon(self._ask_seed, seed)
        for peer in self.due(self._random, self._busy, self._room()):
            self._busy.add(peer)
            nursery.start_soon(self._ask_peer, peer)

    def _room(self) -> int:
        return TRIES_AT_ONCE_MAX - len(self._busy) - self._seeds_busy()

    def _seeds_busy(self) -> int:
        return sum(seed.busy for seed in self._seeds)

    def _wants(self, seed: _Seed, now: float) -> bool:
        if seed.busy or seed.retry_at > now or seed.peer == self.me:
            return False
        return seed.peer is None or self.record_of(seed.peer) is None or self.is_dead(seed.peer)

    async def _ask_seed(self, seed: _Seed) -> None:
        try:
            error = await in_thread(partial(_guarded, partial(self._join, seed)), abandon=True)
        finally:
            seed.busy = False
        if error is None:
            seed.misses = 0
            seed.told = ""
            self._wake()
            return
        seed.misses = min(seed.misses + 1, 32)
        # Weather passes; what is wrong with an address is put right by people.
        wait_s = RETRY_S_MAX if isinstance(error, RemoteError) else self._period_s * 2.0 ** (seed.misses // 4)
        seed.retry_at = time.monotonic() + min(wait_s, RETRY_S_MAX)
        if error.message != seed.told:
            seed.told = error.message
            log.get("peers").warning("cannot join", address=seed.address, error=error.message)

    async def _ask_peer(self, peer: PeerId) -> None:
        try:
            error = await in_thread(partial(_guarded, partial(self._ask, peer)), abandon=True)
        finally:
            self._busy.discard(peer)
        if error is not None:
            self.missed(peer, error)

    def _join(self, seed: _Seed) -> None:
        """In a thread.  The link of first contact is closed again: the peer's record says how to reach it."""
        link = connect(self._identity, seed.address, plaintext=self._links.plaintext, timeout_s=self._links.timeout_s)
        try:
            seed.peer = link.peer
            if link.peer != self.me:
                self._exchange(link)
        finally:
            link.close()

    def _ask(self, peer: PeerId) -> None:
        """In a thread.  A peer that restarted shows another certificate, and is asked once more over a new link."""
        try:
            self._exchange(self._links.to(peer))
        except PeerLost:
            if not self._links.check(peer, EXCHANGE_S):
                raise
            self._exchange(self._links.to(peer))

    def _exchange(self, link: Link) -> None:
        link.metadata()  # or a Hello would be part of the round-trip time
        began = time.monotonic()
        reply = link.call(lambda channel: PeersStub(channel).Exchange, self.request(self._random), timeout_s=EXCHANGE_S)
        rtt_s = time.monotonic() - began
        news = self.merge(reply.records, sender=link.peer)
        self.answered(link.peer, rtt_s)
        self.loaded(link.peer, reply.load)
        if news:
            self._wake()


def _guarded(work: Callable[[], None]) -> ShoalError | None:
    """Why it failed.  A bug that a peer can reach must not end the node; it is told in the log."""
    try:
        work()
    except ShoalError as error:
        return error
    except Exception as error:  # noqa: BLE001  (told, and counted as a failed try)
        log.get("peers").exception("an exchange failed", error=str(error))
        return BrokenInvariant(f"the exchange failed here: {type(error).__name__}")
    return None
