"""The service Peers over gRPC: a thin skin over Callers (Hello), PushPull (records) and the roster.  PROTOCOL.md, 13
and 14.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, cast

from node import address as addresses
from node.hello import caller_of
from node.link import connect
from node.rates import Rates
from node.refusal import refusing
from protos import peers_pb2 as pb
from protos.errors import Overloaded, PeerLost, PermissionDenied, ShoalError
from protos.ids import PeerId
from protos.limits import DIAL_BACKS_AT_ONCE_MAX
from protos.peers_pb2_grpc import PeersServicer, add_PeersServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from node.gossip import Gossip
    from node.hello import Callers
    from node.identity import Identity
    from node.roster import Roster

SYNC_PER_S = 2.0
"""Push-pulls a second that one caller may begin in the long run; two calls each."""

SYNC_BURST = 20.0

HOST_SYNC_PER_S = 20.0
"""And all callers of one host, where identities cost nothing: what a thousand nodes behind one address begin."""

HOST_SYNC_BURST = 200.0
CALLERS_MAX = 4096

DIAL_BACK_PER_S = 0.1
DIAL_BACK_S = 3.0
"""Within it the caller must answer at its address."""


class PeersService:
    """Short calls, which belong into the server's pool for control.  DialBack alone waits for others, few at once."""

    def __init__(
        self,
        callers: Callers,
        roster: Roster,
        gossip: Gossip,
        own: Identity,
        *,
        plaintext: bool = False,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._callers = callers
        self._roster = roster
        self._gossip = gossip
        self._own = own
        self._plaintext = plaintext
        self._clock = clock
        self._monotonic = monotonic
        self._syncs: Rates[PeerId] = Rates(2 * SYNC_PER_S, 2 * SYNC_BURST, CALLERS_MAX)
        self._syncs_of_host: Rates[str] = Rates(2 * HOST_SYNC_PER_S, 2 * HOST_SYNC_BURST, CALLERS_MAX)
        self._dials: Rates[PeerId] = Rates(DIAL_BACK_PER_S, 2.0, CALLERS_MAX)
        self._dialling = threading.BoundedSemaphore(DIAL_BACKS_AT_ONCE_MAX)
        self._rates_lock = threading.Lock()

    def add_to(self, server: grpc.Server) -> None:
        add_PeersServicer_to_server(cast("PeersServicer", self), server)

    def Challenge(self, request: pb.ChallengeRequest, context: grpc.ServicerContext) -> pb.ChallengeReply:  # noqa: N802
        with refusing(context, "peers"):
            return self._callers.challenge(self._clock())

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloReply:  # noqa: N802
        with refusing(context, "peers"):
            return self._callers.hello(request, self._clock(), _host(context.peer()))

    def Sync(self, request: pb.SyncRequest, context: grpc.ServicerContext) -> pb.SyncReply:  # noqa: N802
        with refusing(context, "peers"):
            return self._sync(request, context)

    def Record(self, request: pb.RecordRequest, context: grpc.ServicerContext) -> pb.SignedRecord:  # noqa: N802
        with refusing(context, "peers"):
            return self._record(request)

    def DialBack(self, request: pb.DialBackRequest, context: grpc.ServicerContext) -> pb.DialBackReply:  # noqa: N802
        with refusing(context, "peers"):
            return self._dial_back(caller_of(context).peer)

    def _sync(self, request: pb.SyncRequest, context: grpc.ServicerContext) -> pb.SyncReply:
        caller, host = caller_of(context).peer, _host(context.peer())
        self._admit(self._syncs, caller, "push-pulls", 1 / SYNC_PER_S)
        self._admit_host(addresses.site(host))
        reply = self._gossip.push_pull.answer(caller, host, request)
        self._roster.heard(caller)
        return reply

    def _record(self, request: pb.RecordRequest) -> pb.SignedRecord:
        peer = PeerId(request.peer_id) if request.peer_id else self._roster.me
        signed = self._roster.signed_of(peer)
        if signed is None:
            raise PeerLost(f"no record of the peer {peer[:8]} is known here")
        return pb.SignedRecord.FromString(signed)

    def _dial_back(self, caller: PeerId) -> pb.DialBackReply:
        """Only the address that the caller has signed is called, and only if the caller answers there by name."""
        record = self._roster.record_of(caller)
        if record is None:
            raise PermissionDenied(f"{caller[:8]} is known here as no node of this network: join it first")
        self._admit(self._dials, caller, "calls back", 1 / DIAL_BACK_PER_S)
        if not self._dialling.acquire(blocking=False):
            raise Overloaded(f"{DIAL_BACKS_AT_ONCE_MAX} nodes are called back now", retry_after_s=DIAL_BACK_S)
        try:
            why = self._unreached(caller, record.address)
        finally:
            self._dialling.release()
        return pb.DialBackReply(address=record.address, reached=not why, why=why)

    def _unreached(self, peer: PeerId, address: str) -> str:
        """Why not; empty: it answered calls and datagrams."""
        try:
            connect(self._own, address, plaintext=self._plaintext, peer=peer, timeout_s=DIAL_BACK_S).close()
        except ShoalError as error:
            return f"a call to {address} failed: {error.message}"
        if not self._gossip.answers(peer):
            port = addresses.parse(address).port
            return f"calls to {address} succeed, and datagrams are lost: is UDP port {port} open?"
        return ""

    def _admit(self, rates: Rates[PeerId], caller: PeerId, what: str, retry_after_s: float) -> None:
        with self._rates_lock:
            if rates.admit(caller, self._monotonic()):
                return
        raise Overloaded(f"{caller[:8]} asks for more {what} than one node may", retry_after_s=retry_after_s)

    def _admit_host(self, site: str) -> None:
        """After its callers, so that one of them does not use up what is for all."""
        with self._rates_lock:
            if self._syncs_of_host.admit(site, self._monotonic()):
                return
        raise Overloaded(f"{site} asks for more push-pulls than one host may", retry_after_s=1 / SYNC_PER_S)


def _host(peer: str) -> str:
    """Of what gRPC calls a peer: `ipv4:127.0.0.1:5000`, or `ipv6:%5B::1%5D:5000`."""
    return peer.partition(":")[2].rpartition(":")[0].replace("%5B", "").replace("%5D", "") or peer
