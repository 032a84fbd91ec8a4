"""Mail: where results arrive for the sessions of this node's door, from any thread.

Law: only a peer of a session's route may speak for it, and only for its own stage and its neighbours'; who speaks for a
session that is not open here is refused, so that its stage frees it.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from node.stage_wire import StageFailed, StageNotice
from protos.errors import InvalidRequest, PeerLost, PermissionDenied, UnknownSession
from shard.stage import StepResult

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from node.stage_wire import Result
    from protos.epoch import Epoch
    from protos.errors import ShoalError
    from protos.ids import PeerId, SessionId


@dataclass(slots=True)
class _Box:
    put: Callable[[Result], None]
    epoch: Epoch | None = None
    stages: Mapping[PeerId, int] = field(default_factory=dict)  # remote ones, by peer
    last: int = 0
    comes: bool = False  # its results are fetched, and not delivered


class Mail:
    def __init__(self) -> None:
        self._boxes: dict[SessionId, _Box] = {}
        self._streams: Counter[PeerId] = Counter()
        self._lock = threading.Lock()

    def expect(self, session: SessionId, put: Callable[[Result], None]) -> None:
        """From now on the session's results go to `put`, in whatever thread they come.  It must not block."""
        with self._lock:
            self._boxes[session] = _Box(put)

    def route(
        self, session: SessionId, epoch: Epoch, stages: Mapping[PeerId, int], last: int, *, comes: bool = False
    ) -> None:
        """Which remote peers may speak for the session, as which stage, and which stage is the last one.

        `comes`: this door fetches the session's results (node.collect).
        """
        with self._lock:
            box = self._boxes.get(session)
            if box is not None:
                box.epoch, box.stages, box.last, box.comes = epoch, stages, last, comes

    def forget(self, session: SessionId) -> None:
        with self._lock:
            self._boxes.pop(session, None)

    def deliver(self, result: Result) -> None:
        """From this node itself.  What nobody expects any more is dropped."""
        box = self._boxes.get(result.session)
        if box is not None:
            box.put(result)

    def take(self, peer: PeerId, result: Result) -> None:
        """From another node.  Raises UnknownSession, PermissionDenied or InvalidRequest: the stage is told."""
        box = self._boxes.get(result.session)
        if box is None:
            raise UnknownSession(f"session {result.session} has no door here")
        if box.epoch is not None and result.epoch < box.epoch:
            return  # overtaken: the stage learns of the new epoch, or of its session's end, from the door's calls
        stage = box.stages.get(peer)
        if stage is None or box.epoch is None:
            raise PermissionDenied(f"peer {peer[:8]} is not on the route of session {result.session}")
        if result.epoch > box.epoch:
            raise InvalidRequest(f"session {result.session} is at epoch {box.epoch}, not {result.epoch}")
        _check(result, stage, box.last)
        if not (isinstance(result, StageNotice) and not result.code):
            box.put(result)

    def joined(self, peer: PeerId) -> None:
        """A peer began to deliver results."""
        with self._lock:
            self._streams[peer] += 1

    def left(self, peer: PeerId, *, lost: bool) -> None:
        """A peer's stream ended.  If the last one broke, the stages that it computes are lost.

        One that the peer finished is no loss: it had no session of this door, and begins another for the next one.
        """
        with self._lock:
            self._streams[peer] -= 1
            if self._streams[peer] > 0:
                return
            del self._streams[peer]
        if lost:
            with self._lock:
                sessions = list(self._boxes)
            self.lost(peer, PeerLost("its stream of results has ended"), sessions, comes=False)

    def lost(self, peer: PeerId, error: ShoalError, sessions: Collection[SessionId], *, comes: bool) -> None:
        """What the peer computes of these sessions is lost, as far as their results are fetched (`comes`), or
        delivered: for this reason they do not come any more."""
        with self._lock:
            boxes = [(session, self._boxes[session]) for session in sessions if session in self._boxes]
            parted = [(session, box) for session, box in boxes if peer in box.stages and box.comes is comes]
        for session, box in parted:
            assert box.epoch is not None, "stages and epoch are set together"
            box.put(StageFailed(session, box.epoch, 0, error, box.stages[peer], fetching=box.comes))


def _check(result: Result, stage: int, last: int) -> None:
    if isinstance(result, StageFailed) and (abs(result.stage - stage) > 1 or result.stage > last):
        raise InvalidRequest(f"stage {stage} cannot know that stage {result.stage} failed")
    if isinstance(result, StepResult) and stage != last:
        raise InvalidRequest(f"stage {stage} is not the last and has no answers to give")
