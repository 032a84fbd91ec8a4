"""The service Peers over gRPC: a thin skin over Callers (Hello) and Roster (records).  PROTOCOL.md, 13 and 14."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, cast

from node.hello import caller_of
from node.refusal import refusing
from protos.peers_pb2_grpc import PeersServicer, add_PeersServicer_to_server

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from node.hello import Callers
    from node.roster import Roster
    from protos import peers_pb2 as pb


class PeersService:
    """Three short calls, which wait for nobody: they belong into the server's pool for control."""

    def __init__(self, callers: Callers, roster: Roster, clock: Callable[[], float] = time.time) -> None:
        self._callers = callers
        self._roster = roster
        self._clock = clock
        self._random = random.Random()  # noqa: S311  (for which records to send where there are too many)

    def add_to(self, server: grpc.Server) -> None:
        add_PeersServicer_to_server(cast("PeersServicer", self), server)

    def Challenge(self, request: pb.ChallengeRequest, context: grpc.ServicerContext) -> pb.ChallengeReply:  # noqa: N802
        with refusing(context, "peers"):
            return self._callers.challenge(self._clock())

    def Hello(self, request: pb.HelloRequest, context: grpc.ServicerContext) -> pb.HelloReply:  # noqa: N802
        with refusing(context, "peers"):
            return self._callers.hello(request, self._clock())

    def Exchange(self, request: pb.ExchangeRequest, context: grpc.ServicerContext) -> pb.ExchangeReply:  # noqa: N802
        with refusing(context, "peers"):
            self._roster.admit(caller_of(context).peer, request)
            return self._roster.reply(self._random)
