"""The service Peers over gRPC: a thin skin over Callers (Hello) and Roster (records).  PROTOCOL.md, 13 and 14."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, NoReturn, cast

from node import log, status
from node.hello import caller_of
from protos import peers_pb2 as pb
from protos.errors import BrokenInvariant, InvalidRequest, PeerLost, ShoalError
from protos.ids import PeerId
from protos.limits import PEERS_MESSAGE_BYTES_MAX
from protos.peers_pb2_grpc import PeersServicer, add_PeersServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    import grpc

    from node.hello import Callers
    from node.roster import Roster

    R = TypeVar("R")


class PeersService:
    """Four short calls, which wait for nobody: they belong into the server's pool for control."""

    def __init__(self, callers: Callers, roster: Roster, clock: Callable[[], float] = time.time) -> None:
        self._callers = callers
        self._roster = roster
        self._clock = clock
        self._random = random.Random()  # noqa: S311  (for which records to send where there are too many)

    def add_to(self, server: grpc.Server) -> None:
        add_PeersServicer_to_server(cast("PeersServicer", self), server)

    def Challenge(self, request: pb.ChallengeRequest, context: grpc.ServicerContext) -> pb.ChallengeReply:  # noqa: N802
        return _answered(context, lambda: self._callers.challenge(self._clock()))

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloReply:  # noqa: N802
        return _answered(context, lambda: self._callers.hello(request, self._clock()))

    def Exchange(self, request: pb.ExchangeRequest, context: grpc.ServicerContext) -> pb.ExchangeReply:  # noqa: N802
        return _answered(context, lambda: self._exchange(request, context))

    def Record(self, request: pb.RecordRequest, context: grpc.ServicerContext) -> pb.SignedRecord:  # noqa: N802
        return _answered(context, lambda: self._record(PeerId(request.peer_id) or self._roster.me))

    def _record(self, peer: PeerId) -> pb.SignedRecord:
        signed = self._roster.signed_of(peer)
        if signed is None:
            raise PeerLost(f"this node knows no record of {peer:.8}: it has expired, or never came")
        return pb.SignedRecord.FromString(signed)

    def _exchange(self, request: pb.ExchangeRequest, context: grpc.ServicerContext) -> pb.ExchangeReply:
        if (size := request.ByteSize()) > PEERS_MESSAGE_BYTES_MAX:
            raise InvalidRequest(f"the exchange has {size} bytes; at most {PEERS_MESSAGE_BYTES_MAX} are allowed")
        self._roster.admit(caller_of(context).peer, request)
        return self._roster.reply(self._random)


def _answered(context: grpc.ServicerContext, work: Callable[[], R]) -> R:
    try:
        return work()
    except ShoalError as error:
        _abort(context, error)
    except Exception as error:  # noqa: BLE001  (a bug in one call must not look like anything else to its caller)
        log.get("peers").exception("a call failed", error=str(error))
        _abort(context, BrokenInvariant(f"the node failed: {type(error).__name__}; its log says more"))


def _abort(context: grpc.ServicerContext, error: ShoalError) -> NoReturn:
    context.set_trailing_metadata(status.metadata_of(error))
    context.abort(status.status_of(error), status.details_of(error))
    raise error  # abort has raised; this line tells the type checker so
