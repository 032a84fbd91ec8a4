"""Collect: where nobody can call this node, its door goes to the stages of its routes for their results.

Law: a peer whose stream of results breaks or cannot be made has lost its stages, as if it had broken its own stream to
this door; results count as if they had been delivered; a stream is finished KEEP_S after the last answer that needs
it.  PROTOCOL.md, section 9.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING

from node import log
from node.peer_streams import PeerStreams
from node.stage_wire import read_result, refusal_message
from protos.errors import ShoalError
from protos.stage_pb2_grpc import StageStub

if TYPE_CHECKING:
    from collections.abc import Iterable

    import grpc

    from node.duplex import Duplex
    from node.link import Links
    from node.mail import Mail
    from node.peer_streams import Method
    from node.stages import At
    from protos.ids import PeerId, SessionId
    from protos.manifest import Manifest
    from protos.stage_pb2 import DeliverRefusal, StepResult

# What is refused beyond this is not told: its stage asks again.
REFUSALS_AHEAD_MAX = 256
# A stream is kept so long for the next answer: a stage takes few at a time, and short answers follow each other fast.
KEEP_S = 5.0


class Collect:
    def __init__(self, links: Links, manifest: Manifest, mail: Mail) -> None:
        self._manifest = manifest
        self._mail = mail
        self._users: dict[PeerId, set[SessionId]] = {}
        self._used: dict[PeerId, Duplex[DeliverRefusal, StepResult]] = {}
        self._stranded: dict[PeerId, set[SessionId]] = {}  # by one that broke, whose end is about to be told
        self._kept: dict[PeerId, threading.Timer] = {}  # streams without users
        self._lock = threading.Lock()
        self._streams: PeerStreams[DeliverRefusal, StepResult] = PeerStreams(
            links, _results, self._came, self._ended, queue_max=REFUSALS_AHEAD_MAX
        )

    def enter(self, session: SessionId, stages: Iterable[At]) -> None:
        """Goes to these stages, unless this door is there.  The session's route must be in the mail already."""
        for at in stages:
            try:
                with self._lock:
                    users = self._users.setdefault(at.peer, set())
                    others = users - {session}
                    users.add(session)
                    if (kept := self._kept.pop(at.peer, None)) is not None:
                        kept.cancel()
                    before, stream = self._used.get(at.peer), self._streams.to(at.peer, at.address)
                    self._used[at.peer] = stream
                    if before is not None and before is not stream:
                        self._stranded.setdefault(at.peer, set()).update(others)
            except ShoalError as error:
                self._mail.lost(at.peer, error, {session}, comes=True)

    def leave(self, session: SessionId) -> None:
        """The answer is over."""
        with self._lock:
            for peer in [peer for peer, users in self._users.items() if session in users]:
                self._users[peer].discard(session)
                if not self._users[peer]:
                    del self._users[peer]
                    kept = self._kept[peer] = threading.Timer(KEEP_S, self._drop, (peer,))
                    kept.start()

    def close(self, timeout_s: float) -> None:
        with self._lock:
            for kept in self._kept.values():
                kept.cancel()
            self._kept.clear()
        self._streams.close(timeout_s)

    def _drop(self, peer: PeerId) -> None:
        with self._lock:
            if self._kept.get(peer) is threading.current_thread():  # or it is needed again since this began
                del self._kept[peer]
                self._used.pop(peer, None)
                self._streams.drop(peer)

    def _came(self, peer: PeerId, result: StepResult) -> None:
        try:
            self._mail.take(peer, read_result(result, self._manifest))
        except ShoalError as error:
            with contextlib.suppress(ShoalError):
                self._streams.send(peer, refusal_message(result, error))

    def _ended(self, peer: PeerId, error: ShoalError) -> None:
        log.get("door").info("a stream of a stage's results has ended", peer=peer, code=error.code, error=error.message)
        with self._lock:
            lost = self._stranded.pop(peer, set())
            if not self._streams.alive(peer):  # or another answer has begun the next one
                self._used.pop(peer, None)
                lost |= self._users.get(peer, set())
        self._mail.lost(peer, error, lost, comes=True)


def _results(channel: grpc.Channel) -> Method[DeliverRefusal, StepResult]:
    return StageStub(channel).Results
