"""Steps to the next stage of each session: streams that several sessions share, and who hears when one breaks.

Law: whoever sends steps to a stage is told once for each break, refusal or full queue, as that stage's failure; a door
is the stage before the first.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node.peer_streams import PeerStreams
from node.stage_wire import StageFailed, read_epoch
from protos import messages
from protos.errors import ShoalError
from protos.stage_pb2_grpc import StageStub

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from node.link import Links
    from node.peer_streams import Method
    from protos.epoch import Epoch
    from protos.ids import PeerId, SessionId
    from protos.stage_pb2 import Step, StepAck

# Sessions of one node times the steps that a session may have under way, several times over.
STEPS_AHEAD_MAX = 2048


@dataclass(frozen=True, slots=True, eq=False)
class Onward:
    """Where a session's steps go from here in one epoch, and who must hear what comes of it."""

    session: SessionId
    epoch: Epoch
    stage: int  # that receives
    peer: PeerId
    address: str
    tell: Callable[[StageFailed], None]

    def failed(self, error: ShoalError, position: int = 0) -> None:
        self.tell(StageFailed(self.session, self.epoch, position, error, self.stage))


class Onwards:
    def __init__(self, links: Links) -> None:
        self._streams: PeerStreams[Step, StepAck] = PeerStreams(
            links, _steps, self._refused, self._ended, queue_max=STEPS_AHEAD_MAX
        )
        self._onwards: dict[PeerId, dict[tuple[SessionId, int], Onward]] = {}
        self._lock = threading.Lock()

    def open(self, onward: Onward) -> None:
        """Begins the stream, so that the first step need not wait for it."""
        try:
            with self._lock:
                self._onwards.setdefault(onward.peer, {})[onward.session, onward.stage] = onward
                self._streams.to(onward.peer, onward.address)
        except ShoalError as error:
            onward.failed(error)

    def send(self, onward: Onward, make: Callable[[], Step], position: int) -> None:
        """`make` encodes the step, in the sending thread.  What goes wrong is told to the onward."""
        try:
            self._streams.to(onward.peer, onward.address).send(make)
        except ShoalError as error:
            onward.failed(error, position)

    def forget(self, onward: Onward) -> None:
        """The session goes on elsewhere, or ended."""
        with self._lock:
            mine = self._onwards.get(onward.peer, {})
            if mine.get((onward.session, onward.stage)) is onward:
                del mine[onward.session, onward.stage]
            if not mine:
                self._onwards.pop(onward.peer, None)

    def drop_idle(self) -> None:
        """Ends the streams that no session uses."""
        with self._lock:
            for peer in self._streams.peers():
                if peer not in self._onwards:
                    self._streams.drop(peer)

    def close(self, timeout_s: float) -> None:
        self._streams.close(timeout_s)

    def _refused(self, peer: PeerId, ack: StepAck) -> None:
        if not ack.HasField("refused"):
            return
        with self._lock:
            found = [o for o in self._onwards.get(peer, {}).values() if o.session == ack.session_id]
        for onward in found:
            if onward.epoch == read_epoch(ack.epoch):
                onward.failed(messages.error(ack.refused), ack.start)

    def _ended(self, peer: PeerId, error: ShoalError) -> None:
        with self._lock:
            onwards = list(self._onwards.get(peer, {}).values())
        for onward in onwards:
            onward.failed(error)


def _steps(channel: grpc.Channel) -> Method[Step, StepAck]:
    return StageStub(channel).Steps
