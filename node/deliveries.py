"""Deliveries: results to the doors whose sessions this node computes, and which of those doors are gone.

A door is called, or, where its address is empty because nobody can call it, comes for its results.  Law: a door that
cannot be reached, or does not come, for DOOR_LOST_S is lost, however often its address takes a connection meanwhile.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from node import log
from node.peer_streams import PeerStreams
from node.pickup import RESULTS_AHEAD_MAX, Pickup, Reader
from protos.errors import ShoalError
from protos.stage_pb2_grpc import DoorStub

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import grpc

    from node.link import Links
    from node.peer_streams import Method
    from protos.ids import PeerId
    from protos.stage_pb2 import DeliverRefusal, StepResult

# A door that restarts comes back as another door; one whose network comes back may have waited for repair itself.
DOOR_LOST_S = 30.0
# Above gRPC's 20 s for a connection that nothing answers: a stream of that age is a connection.
SETTLED_S = 25.0


@dataclass(slots=True)
class _Door:
    address: str
    sessions: int = 0
    begun_at: float = 0.0  # its stream
    lost_at: float | None = None


class Deliveries:
    def __init__(
        self, links: Links, on_refusal: Callable[[PeerId, DeliverRefusal], None], now: Callable[[], float]
    ) -> None:
        self._now = now
        self._doors: dict[PeerId, _Door] = {}
        self._pickups: dict[PeerId, Pickup] = {}
        self._lock = threading.Lock()
        self._streams: PeerStreams[StepResult, DeliverRefusal] = PeerStreams(
            links, _deliver, on_refusal, self._ended, queue_max=RESULTS_AHEAD_MAX
        )

    def enter(self, peer: PeerId, address: str) -> None:
        """One session more of this door; its stream is begun, so that the first result need not wait for it.

        `address` empty: it will come.
        """
        with self._lock:
            door = self._doors.setdefault(peer, _Door(address, begun_at=self._now()))
            door.address = address
            door.sessions += 1
            if not address:
                self._pickups.setdefault(peer, Pickup())
        self._begin(peer)

    def leave(self, peer: PeerId) -> None:
        """One session less.  A door without sessions is forgotten, and its stream ended a sweep later."""
        with self._lock:
            door = self._doors.get(peer)
            if door is None:
                return
            door.sessions -= 1
            if door.sessions == 0:
                del self._doors[peer]
                self._drop_unused(peer)

    def send(self, peer: PeerId, address: str, make: Callable[[], StepResult]) -> None:
        """What cannot be sent is lost; the door finds out by its step's deadline, and asks."""
        try:
            if address:
                self._streams.to(peer, address).send(make)
            elif (pickup := self._pickups.get(peer)) is not None:
                pickup.put(make)
        except ShoalError as error:
            log.get("stage").warning("a result could not be sent", door=peer, code=error.code, error=str(error))

    def come(self, peer: PeerId, reader: Reader) -> Iterator[StepResult]:
        """A door comes: what there is for it, until `go`, or until it comes anew."""
        with self._lock:
            pickup = self._pickups.setdefault(peer, Pickup())
            pickup.begin(reader)
        return pickup.read(reader)

    def go(self, peer: PeerId, reader: Reader) -> None:
        """The door is gone again.  May be repeated."""
        with self._lock:
            pickup = self._pickups.get(peer)
            if pickup is not None:
                pickup.end(reader)
            self._drop_unused(peer)

    def sweep(self) -> list[PeerId]:
        """Calls doors again whose stream has ended, and gives those that are lost."""
        now = self._now()
        lost = []
        for peer, door in self._listed():
            if self._is_connected(peer, door):
                if not door.address or now - door.begun_at >= SETTLED_S:
                    door.lost_at = None
            elif door.lost_at is None:
                door.lost_at = now
            if door.lost_at is not None and now - door.lost_at >= DOOR_LOST_S:
                lost.append(peer)
            elif not self._is_connected(peer, door):
                self._begin(peer)
        self._drop_idle()
        return lost

    def close(self, timeout_s: float) -> None:
        with self._lock:
            pickups = list(self._pickups.values())
        for pickup in pickups:
            pickup.end()
        self._streams.close(timeout_s)

    def _is_connected(self, peer: PeerId, door: _Door) -> bool:
        if door.address:
            return self._streams.alive(peer)
        pickup = self._pickups.get(peer)
        return pickup is not None and pickup.is_read

    def _listed(self) -> list[tuple[PeerId, _Door]]:
        with self._lock:
            return list(self._doors.items())

    def _begin(self, peer: PeerId) -> None:
        with self._lock:
            door = self._doors.get(peer)
            if door is None or not door.address or self._streams.alive(peer):
                return
            door.begun_at = self._now()
            try:
                self._streams.to(peer, door.address)
            except ShoalError as error:
                log.get("stage").warning("a door cannot be called", door=peer, code=error.code, error=str(error))

    def _drop_idle(self) -> None:
        with self._lock:
            for peer in self._streams.peers():
                if peer not in self._doors:
                    self._streams.drop(peer)

    def _drop_unused(self, peer: PeerId) -> None:
        """Under the lock: a pickup stays while its door has a session here, or reads."""
        pickup = self._pickups.get(peer)
        if pickup is not None and peer not in self._doors and not pickup.is_read:
            del self._pickups[peer]

    def _ended(self, peer: PeerId, error: ShoalError) -> None:
        with self._lock:
            door = self._doors.get(peer)
            if door is not None and door.lost_at is None:
                door.lost_at = self._now()
        log.get("stage").info("a stream of results has ended", door=peer, code=error.code, error=str(error))


def _deliver(channel: grpc.Channel) -> Method[StepResult, DeliverRefusal]:
    return DoorStub(channel).Deliver
