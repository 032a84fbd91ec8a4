"""Collect: where nobody can call this node, its door goes to the stages of its routes for their results.

Law: a peer whose stream of results ends or cannot be made has lost its stages, as if it had broken its own stream to
this door; results count as if they had been delivered.  PROTOCOL.md, section 9.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from node import log
from node.peer_streams import PeerStreams
from node.stage_wire import read_epoch, read_result
from node.stages import At
from protos import stage_pb2 as pb
from protos.errors import Fenced, ShoalError, UnknownSession
from protos.ids import SessionId
from protos.stage_pb2_grpc import StageStub

if TYPE_CHECKING:
    from collections.abc import Iterator

    import grpc

    from node.duplex import StreamCall
    from node.link import Links
    from node.mail import Mail
    from node.peer_streams import Method
    from node.stages import Stages
    from protos.ids import PeerId
    from protos.manifest import Manifest


class Collect:
    """`stages`: to close a session there that has no door here any more."""

    def __init__(self, links: Links, manifest: Manifest, mail: Mail, stages: Stages) -> None:
        self._manifest = manifest
        self._mail = mail
        self._stages = stages
        self._addresses: dict[PeerId, str] = {}
        self._lock = threading.Lock()
        self._streams: PeerStreams[pb.ResultsRequest, pb.StepResult] = PeerStreams(
            links, _results, self._came, self._ended, queue_max=1
        )

    def begin(self, at: At) -> None:
        """Goes to that stage, unless this door is there.  The session's route must be in the mail already."""
        with self._lock:
            self._addresses[at.peer] = at.address
        try:
            self._streams.to(at.peer, at.address)
        except ShoalError as error:
            self._ended(at.peer, error)

    def close(self, timeout_s: float) -> None:
        self._streams.close(timeout_s)

    def _came(self, peer: PeerId, result: pb.StepResult) -> None:
        try:
            self._mail.take(peer, read_result(result, self._manifest))
        except (UnknownSession, Fenced):
            at = At(peer, self._addresses[peer])
            self._stages.close(at, SessionId(result.session_id), read_epoch(result.epoch))
        except ShoalError as error:
            log.get("door").warning("a result is refused", peer=peer, code=error.code, error=error.message)

    def _ended(self, peer: PeerId, error: ShoalError) -> None:
        log.get("door").info("results of a stage come no more", peer=peer, code=error.code, error=error.message)
        self._mail.lost(peer)


def _results(channel: grpc.Channel) -> Method[pb.ResultsRequest, pb.StepResult]:
    def come(
        _: Iterator[pb.ResultsRequest], /, *, metadata: tuple[tuple[str, str], ...] | None = None
    ) -> StreamCall[pb.StepResult]:
        return StageStub(channel).Results(pb.ResultsRequest(), metadata=metadata)

    return come
