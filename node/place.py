"""Place: a session at a stage in one epoch: which stage this node is, and who stands around it.

Law: a node serves its span whole, once in a route; the session is its door's, and steps come from the stage
before.  PROTOCOL.md, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from node.onward import Onward
from node.stage_wire import read_epoch
from protos.errors import Fenced, InvalidRequest, PermissionDenied
from protos.ids import PeerId, SessionId

if TYPE_CHECKING:
    from collections.abc import Callable

    from node.stage_wire import StageFailed
    from protos import stage_pb2 as pb
    from protos.epoch import Epoch


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    session: SessionId
    epoch: Epoch
    stage: int
    door: PeerId
    door_address: str
    before: PeerId  # who sends the steps: the previous stage, or the door
    onward: Onward | None  # None: this is the last stage

    def check_door(self, caller: PeerId) -> None:
        """Raises PermissionDenied."""
        if caller != self.door or self.epoch.door != self.door:
            raise PermissionDenied(f"session {self.session} is peer {self.door[:8]}'s; {caller[:8]} is not its door")

    def check_sender(self, caller: PeerId) -> None:
        """Raises PermissionDenied."""
        if caller != self.before:
            raise PermissionDenied(f"steps of session {self.session} come from peer {self.before[:8]} here")

    def check_epoch(self, epoch: Epoch) -> None:
        """Raises Fenced or InvalidRequest."""
        if epoch < self.epoch:
            raise Fenced(f"session {self.session} is at epoch {self.epoch}, above {epoch}")
        if epoch > self.epoch:
            raise InvalidRequest(f"session {self.session} is at epoch {self.epoch}, below {epoch}: raise it first")


def read(
    me: PeerId,
    span: range,
    layers: int,
    request: pb.OpenRequest | pb.RaiseEpochRequest,
    tell: Callable[[PeerId, str, StageFailed], None],
) -> Place:
    """The place of node `me`, whose span is `span`, in a request that messages.check_* have passed.

    `tell` takes a door, its address, and what failed.  Raises InvalidRequest where the route has something else to do
    for this node than its span.
    """
    route, stage = request.route, request.stage
    mine = route.stages[stage]
    if mine.peer.peer_id != me:
        raise InvalidRequest(f"stage {stage} is peer {mine.peer.peer_id[:8]}, and this is {me[:8]}")
    if sum(entry.peer.peer_id == me for entry in route.stages) > 1:
        raise InvalidRequest(f"peer {me[:8]} has several stages of one route; it serves its span whole, as one")
    if range(mine.first_layer, mine.last_layer + 1) != span:
        raise InvalidRequest(
            f"a stage of layers {mine.first_layer} to {mine.last_layer}; this node serves its span whole, "
            f"{span.start} to {span.stop - 1}"
        )
    if route.stages[-1].last_layer != layers - 1:
        raise InvalidRequest(f"the route ends after layer {route.stages[-1].last_layer}, the model does not")
    session, epoch, door = SessionId(request.session_id), read_epoch(request.epoch), PeerId(route.door.peer_id)
    onward = None
    if stage + 1 < len(route.stages):
        after = route.stages[stage + 1].peer
        failed = partial(tell, door, route.door.address)
        onward = Onward(session, epoch, stage + 1, PeerId(after.peer_id), after.address, failed)
    before = route.stages[stage - 1].peer if stage else route.door
    return Place(session, epoch, stage, door, route.door.address, PeerId(before.peer_id), onward)
