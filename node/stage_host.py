"""The sessions that this node computes, for its own door and for others': fences, and where results go from here.

Thread-safe.  Laws: nothing here waits for the network or for compute; whatever ends a feed at this stage is told to the
session's door once; a step's results leave in the order in which they were computed.  PROTOCOL.md, sections 8 and 9.
"""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from node import futures, log, rows
from node.deliveries import Deliveries
from node.onward import Onwards
from node.place import read as read_place
from node.stage_wire import (
    StageFailed,
    StageNotice,
    read_epoch,
    read_open,
    read_step,
    result_message,
    step_message,
)
from protos import messages
from protos import stage_pb2 as pb
from protos.errors import (
    BrokenInvariant,
    Fenced,
    InvalidFrame,
    InvalidRequest,
    NonFinite,
    Overloaded,
    ShoalError,
    UnitMissing,
    UnknownSession,
    WrongModel,
)
from protos.ids import PeerId, SessionId

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future

    from node.capacity import Capacity
    from node.link import Links
    from node.pickup import Reader
    from node.place import Place
    from node.stage_wire import Result
    from protos.epoch import Epoch
    from protos.manifest import Manifest
    from shard.batch import Step
    from shard.stage import OpenSession, StepResult

# Above what any worker takes, so that it is the worker's own limit that is met.
SESSIONS_MAX = 4096
# A door is asked so often whether it still wants a session that gets no steps: its Close may have been lost.
IDLE_S = 60.0
SWEEP_PERIOD_S = 1.0
JOIN_S = 2.0


class Compute(Protocol):
    """What computes: shard.worker.Worker, and a toy in tests."""

    def open(self, request: OpenSession) -> Future[None]: ...
    def step(self, step: Step) -> Future[StepResult]: ...
    def raise_epoch(self, session: SessionId, expected: Epoch, epoch: Epoch) -> Future[None]: ...
    def truncate(self, session: SessionId, position: int) -> Future[None]: ...
    def close(self, session: SessionId, epoch: Epoch) -> Future[None]: ...
    def call(self, run: Callable[[Any], Any]) -> Future[Any]: ...


@dataclass(slots=True, eq=False)
class _Hosted:
    place: Place
    resume_key_sha256: bytes
    touched: float
    positions: int = 0  # of KV, reserved
    running: int = 0  # steps in the worker
    # A step that failed has others of its feed behind it, which fail for that reason alone: the position at which the
    # next of them begins.  A new feed never begins there, since it begins below what has failed.
    broken_at: int | None = None


class StageHost:
    """`span`: the layers whose trunk is here, served whole.  `worker` is None on a node without trunk.

    `capacity`: what other nodes' doors share of it; None: whoever comes first takes what the worker gives.
    """

    def __init__(
        self,
        me: pb.Peer,
        manifest: Manifest,
        worker: Compute | None,
        span: range,
        links: Links,
        *,
        capacity: Capacity | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.me = PeerId(me.peer_id)
        self.manifest = manifest
        self.worker = worker
        self.span = span
        self._capacity = capacity
        self._now = now
        self._sink: Callable[[Result], None] = _nobody
        self._rows_max = rows.count_max(manifest)
        self._sessions: dict[SessionId, _Hosted] = {}
        self._lock = threading.Lock()
        self.onwards = Onwards(links)
        self._deliveries = Deliveries(links, self.refused, now)
        self._leaving = threading.Event()
        self._sweeper: threading.Thread | None = None  # while no other node was involved there is nothing to sweep

    def deliver_to(self, sink: Callable[[Result], None]) -> None:
        """Where results for this node's own door go, in the worker's thread."""
        self._sink = sink

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, request: pb.OpenRequest, caller: PeerId | None = None) -> Future[int]:
        """Positions held: 0.  `caller`: None is this node's own door.

        Raises or fails with InvalidRequest, WrongModel, PermissionDenied, UnitMissing, Overloaded or ContextTooLong.
        """
        messages.check_open(request)
        worker = self._computer()
        if request.model_id != self.manifest.model_id:
            raise WrongModel(f"this node serves {self.manifest.model_id}, not {request.model_id}")
        if request.standby:
            raise InvalidRequest("this node takes no hand-off, so it can stand by for no stage")
        place = self._place(request, caller)
        opening = read_open(request)
        hosted = _Hosted(place, request.resume_key_sha256, self._now(), request.positions)
        self._add(hosted)
        opened = worker.open(opening)
        opened.add_done_callback(lambda done: self._opened(hosted, done))
        return futures.mapped(opened, lambda _: 0)

    def raise_epoch(self, request: pb.RaiseEpochRequest, caller: PeerId | None = None) -> Future[int]:
        """Compare-and-set; gives the positions held.  Raises InvalidRequest, UnknownSession or Fenced."""
        messages.check_raise(request)
        worker = self._computer()
        place = self._place(request, caller)
        session, expected = place.session, read_epoch(request.expected)
        with self._lock:
            hosted = self._find(session)
            old = hosted.place
            if old.epoch != expected:
                raise Fenced(f"session {session} is at epoch {old.epoch}; it cannot be raised from {expected}")
            if not hmac.compare_digest(hashlib.sha256(request.resume_key).digest(), hosted.resume_key_sha256):
                raise Fenced(f"the resume key is not that of session {session}")
            hosted.place, hosted.broken_at, hosted.touched = place, None, self._now()
        self._enter(place)
        self._leave(old)
        raised = worker.raise_epoch(session, expected, place.epoch)
        return futures.after(raised, lambda error: raised if error else worker.call(lambda stage: stage.held(session)))

    def truncate(self, request: pb.TruncateRequest, caller: PeerId | None = None) -> Future[int]:
        """Forgets what is from `position` on.  Raises or fails with UnknownSession, Fenced, PermissionDenied or Gap."""
        place = self._in_force(SessionId(request.session_id), read_epoch(request.epoch))
        place.check_door(caller or self.me)
        truncated = self._computer().truncate(place.session, request.position)
        return futures.mapped(truncated, lambda _: request.position)

    def close(self, session: SessionId, epoch: Epoch, caller: PeerId | None = None) -> Future[None]:
        """Frees a session; one that is not open is none.  Raises Fenced or PermissionDenied."""
        with self._lock:
            hosted = self._sessions.get(session)
            if hosted is None:
                return futures.done(None)
            hosted.place.check_door(caller or self.me)
            if epoch < hosted.place.epoch:
                hosted.place.check_epoch(epoch)
            del self._sessions[session]
        self._leave(hosted.place)
        return self._computer().close(session, epoch)

    def feed(self, step: Step, reply: pb.Reply.ValueType, caller: PeerId | None = None) -> None:
        """Queues a step.  Raises UnknownSession, Fenced, InvalidRequest or PermissionDenied; what only the computing
        thread can know (gap, overloaded, the forward's own errors) goes to the door."""
        with self._lock:
            hosted = self._find(step.session)
            place = hosted.place
            place.check_epoch(step.epoch)
            place.check_sender(caller or self.me)
            if place.onward is not None and step.end - step.start > self._rows_max:
                raise InvalidRequest(f"a step of {step.end - step.start} rows; at most {self._rows_max} fit a frame")
            hosted.running += 1
            hosted.touched = self._now()
        self._computer().step(step).add_done_callback(partial(self._stepped, hosted, place, step, reply))

    def take(self, message: pb.Step, caller: PeerId) -> None:
        """A step from another node: as feed, which raises for what the sender must hear.

        Rows that are no rows are the sending stage's doing, and its door's to judge.
        """
        messages.check_step(message)
        place = self._in_force(SessionId(message.session_id), read_epoch(message.epoch))
        place.check_sender(caller)
        try:
            step = read_step(message, self.manifest, first=place.stage == 0)
        except (InvalidFrame, NonFinite) as error:
            sender = max(place.stage - 1, 0)
            self._tell(place, StageFailed(place.session, place.epoch, message.start, error, sender))
        else:
            self.feed(step, message.reply, caller)

    def results(self, door: PeerId, reader: Reader) -> Iterator[pb.StepResult]:
        """For a door that comes for them.  Blocks between them, until `end_results`."""
        return self._deliveries.come(door, reader)

    def end_results(self, door: PeerId, reader: Reader) -> None:
        """The door that read them is gone.  From any thread."""
        self._deliveries.go(door, reader)

    def notice(self, code: str, message: str, peer: PeerId, *, late: bool = False) -> None:
        """Tells the doors whose steps are being computed that something failed, or was `late`, and that they go on.

        From any thread.
        """
        with self._lock:
            places = [hosted.place for hosted in self._sessions.values() if hosted.running]
        for place in places:
            self._tell(place, StageNotice(place.session, place.epoch, 0, code, message, peer, late=late))

    def sweep(self) -> None:
        """Frees the sessions of doors that are lost, and asks doors about sessions that get no steps."""
        lost = set(self._deliveries.sweep())
        self.onwards.drop_idle()
        now = self._now()
        with self._lock:
            remote = [hosted for hosted in self._sessions.values() if hosted.place.door != self.me]
        for hosted in remote:
            place = hosted.place
            if place.door in lost:
                log.get("stage").warning("a session's door is lost", session=place.session, door=place.door)
                self.close(place.session, place.epoch, place.door)
            elif now - hosted.touched >= IDLE_S:
                hosted.touched = now
                self._tell(place, StageNotice(place.session, place.epoch, 0, "", "", PeerId("")))

    def shutdown(self) -> None:
        """Ends all streams and the sweeping.  The worker's own end is its owner's to bring."""
        self._leaving.set()
        with self._lock:  # whoever is opening the first session has started it then
            sweeper = self._sweeper
        if sweeper is not None:
            sweeper.join(JOIN_S)
        self.onwards.close(JOIN_S)
        self._deliveries.close(JOIN_S)

    def _keep_house(self) -> None:
        while not self._leaving.wait(SWEEP_PERIOD_S):
            try:
                self.sweep()
            except Exception as error:  # noqa: BLE001  (one session's trouble must not stop the sweeping)
                log.get("stage").exception("a sweep failed", error=str(error))

    def _computer(self) -> Compute:
        if self.worker is None:
            raise UnitMissing("this node holds no trunk, so it computes no stage; plan without it")
        return self.worker

    def _place(self, request: pb.OpenRequest | pb.RaiseEpochRequest, caller: PeerId | None) -> Place:
        place = read_place(self.me, self.span, self.manifest.layers, request, self._tell_door)
        place.check_door(caller or self.me)
        return place

    def _add(self, hosted: _Hosted) -> None:
        session = hosted.place.session
        with self._lock:
            if session in self._sessions:
                raise InvalidRequest(f"session {session} is open already")
            if len(self._sessions) >= SESSIONS_MAX:
                raise Overloaded(f"{SESSIONS_MAX} sessions are open here", retry_after_s=1.0)
            if self._capacity is not None and hosted.place.door != self.me:
                opened = [(other.place.door, other.positions) for other in self._sessions.values()]
                self._capacity.check(hosted.place.door, hosted.positions, opened)
            self._sessions[session] = hosted
            if self._sweeper is None and (hosted.place.door != self.me or hosted.place.onward is not None):
                self._sweeper = threading.Thread(target=self._keep_house, name="shoal-stage-host", daemon=True)
                self._sweeper.start()
        self._enter(hosted.place)

    def _enter(self, place: Place) -> None:
        if place.door != self.me:
            self._deliveries.enter(place.door, place.door_address)
        if place.onward is not None:
            self.onwards.open(place.onward)

    def _leave(self, place: Place) -> None:
        if place.door != self.me:
            self._deliveries.leave(place.door)
        if place.onward is not None:
            self.onwards.forget(place.onward)

    def _opened(self, hosted: _Hosted, done: Future[None]) -> None:
        if done.exception() is None:
            return
        with self._lock:
            session = hosted.place.session
            if self._sessions.get(session) is not hosted:
                return  # closed meanwhile, and perhaps opened anew
            del self._sessions[session]
        self._leave(hosted.place)

    def _find(self, session: SessionId) -> _Hosted:
        try:
            return self._sessions[session]
        except KeyError:
            raise UnknownSession(f"session {session} is not open here") from None

    def _in_force(self, session: SessionId, epoch: Epoch) -> Place:
        with self._lock:
            place = self._find(session).place
        place.check_epoch(epoch)
        return place

    def _stepped(
        self, hosted: _Hosted, place: Place, step: Step, reply: pb.Reply.ValueType, done: Future[StepResult]
    ) -> None:
        """In the worker's thread."""
        error = done.exception()
        with self._lock:
            hosted.running -= 1
            if hosted.place is not place:
                return  # fenced meanwhile: the new epoch's door has no use for this
            follows = error is not None and hosted.broken_at == step.start
            hosted.broken_at = None if error is None else step.end
        if error is None:
            self._pass_on(place, step, reply, done.result())
        elif not follows and self._sessions.get(place.session) is hosted:
            told = error if isinstance(error, ShoalError) else BrokenInvariant(f"a step failed: {error}")
            self._tell(place, StageFailed(place.session, place.epoch, step.start, told, place.stage))

    def _pass_on(self, place: Place, step: Step, reply: pb.Reply.ValueType, result: StepResult) -> None:
        if place.onward is None:
            self._tell(place, result, reply)
        else:
            make = partial(step_message, step, reply, result.rows)
            self.onwards.send(place.onward, make, step.start)

    def _tell(self, place: Place, result: Result, reply: pb.Reply.ValueType = pb.REPLY_TOKEN) -> None:
        self._tell_door(place.door, place.door_address, result, reply)

    def _tell_door(
        self, door: PeerId, address: str, result: Result, reply: pb.Reply.ValueType = pb.REPLY_TOKEN
    ) -> None:
        if door == self.me:
            self._sink(result)
        else:
            self._deliveries.send(door, address, partial(result_message, result, reply))

    def refused(self, door: PeerId, refusal: pb.DeliverRefusal) -> None:
        """A door does not know a session, or no longer: nobody else will close it."""
        hosted = self._sessions.get(SessionId(refusal.session_id))
        if hosted is None or hosted.place.door != door:
            return
        error = messages.error(refusal.error)
        if not isinstance(error, UnknownSession | Fenced):
            log.get("stage").warning("a door refused a result", door=door, code=error.code, error=str(error))
            return
        try:
            self.close(SessionId(refusal.session_id), read_epoch(refusal.epoch), door)
        except ShoalError as why:
            log.get("stage").info("a refused session stays", session=refusal.session_id, code=why.code)


def _nobody(result: Result) -> None:
    """Until a door says where results go, there is none."""
