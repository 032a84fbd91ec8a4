"""The thread that owns a stage.

Callers hand in work and get a Future; nothing here calls back into the network, waits in a finaliser, or outlives
`shutdown`.  A cancelled Future frees nobody: a session ends when it is closed.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from protos.errors import BrokenInvariant, Fenced, Gap, Overloaded, ShoalError, ShuttingDown, UnknownSession
from shard import batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from protos.epoch import Epoch
    from protos.ids import SessionId
    from shard.batch import Chunk, Step
    from shard.stage import OpenSession, Stage, StepResult

ROWS_MAX = 256  # rows of one forward: a running answer waits for at most one such batch
GATHER_S = (
    0.001  # how long a batch waits for the sessions of the last one: their doors need a moment to feed the next token
)
STEPS_QUEUED_MAX = 16  # of one session, behind the step under way: the chunks of a feed on their way through a route
INBOX_MAX = 4096  # steps and opens that the thread has not looked at yet; closing always gets in
RETRY_AFTER_S = 0.5


@dataclass(slots=True, eq=False)
class _Job:
    run: Callable[[], object]
    future: Future[Any]


@dataclass(slots=True, eq=False)
class _Feed:
    step: Step
    at: int
    future: Future[StepResult]
    rows: list[torch.Tensor]


class _Stop:
    pass


class Worker:
    """Runs a stage's sessions in one thread.  All methods may be called from any thread."""

    def __init__(self, stage: Stage, *, rows_max: int = ROWS_MAX, sessions_max: int = 64) -> None:
        self._stage = stage
        self._rows_max = min(rows_max, stage.rows_max)
        self._sessions_max = min(sessions_max, stage.rows_max)  # each may have a row in every forward
        self._inbox: queue.SimpleQueue[_Job | _Feed | _Stop] = queue.SimpleQueue()
        self._feeds: dict[SessionId, _Feed] = {}  # under way, in order of arrival
        self._queued: dict[SessionId, deque[_Feed]] = {}  # behind them, one session's in order
        self._expected: set[SessionId] = set()  # sessions whose next step should be here soon
        self._lock = threading.Lock()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="shoal-stage", daemon=True)
        self._thread.start()

    @property
    def kv_bytes(self) -> tuple[int, int]:
        """KV bytes reserved, and their limit."""
        return self._stage.kv.bytes_used, self._stage.kv.bytes_max

    @property
    def capacity(self) -> tuple[int, int]:
        """Sessions that fit, and positions of all of them together."""
        return self._sessions_max, self._stage.kv.bytes_max // max(1, self._stage.kv.bytes_per_position)

    @property
    def sessions(self) -> int:
        return len(self._stage)

    def open(self, request: OpenSession) -> Future[None]:
        """Reserves a session.  Fails with Overloaded (sessions, KV), InvalidRequest or ContextTooLong."""
        return self._submit(lambda: self._open(request))

    def step(self, step: Step) -> Future[StepResult]:
        """Feeds a session; its steps run in order, and rows queued before a step count as held for it.

        Fails as Stage.begin says, with what the forward raised, or with Overloaded when STEPS_QUEUED_MAX steps wait.
        """
        future: Future[StepResult] = Future()
        self._put(_Feed(step, step.start, future, []))
        return future

    def raise_epoch(self, session: SessionId, expected: Epoch, epoch: Epoch) -> Future[None]:
        """Stage.raise_epoch; what was under way or queued for the lower epoch fails with Fenced."""
        return self._submit(lambda: self._raise_epoch(session, expected, epoch))

    def truncate(self, session: SessionId, position: int) -> Future[None]:
        """Rewinds a session's KV; a step that is under way fails with Gap."""
        return self._submit(lambda: self._truncate(session, position))

    def close(self, session: SessionId, epoch: Epoch) -> Future[None]:
        """Frees a session; steps that wait fail with UnknownSession.  Fenced from a door that was replaced."""
        return self._submit(lambda: self._close(session, epoch), always=True)

    def call(self, run: Callable[[Stage], Any]) -> Future[Any]:
        """Runs a function on the stage between two batches (export and import of KV)."""
        return self._submit(lambda: run(self._stage))

    def shutdown(self) -> None:
        """Ends the thread after the batch that runs; all that waits fails with ShuttingDown.  May be repeated."""
        with self._lock:
            if not self._stopped:
                self._stopped = True
                self._inbox.put(_Stop())
        self._thread.join()

    def _submit(self, run: Callable[[], object], *, always: bool = False) -> Future[Any]:
        future: Future[Any] = Future()
        self._put(_Job(run, future), always=always)
        return future

    def _put(self, item: _Job | _Feed, *, always: bool = False) -> None:
        refusal: ShoalError
        with self._lock:
            if self._stopped:
                refusal = ShuttingDown("this node is shutting down")
            elif self._inbox.qsize() >= INBOX_MAX and not always:
                refusal = Overloaded(f"{INBOX_MAX} requests wait for this stage", retry_after_s=RETRY_AFTER_S)
            else:
                self._inbox.put(item)
                return
        item.future.set_exception(refusal)

    def _loop(self) -> None:
        while self._take_in():
            if self._feeds:
                self._run_batch()
        for session in list(self._feeds):
            self._give_up(session, ShuttingDown("this node is shutting down"))

    def _take_in(self) -> bool:
        """Takes what has arrived; waits when there is nothing to do.  False when the worker must stop."""
        deadline = time.monotonic() + GATHER_S
        stop = False
        while True:
            try:
                item = self._next_item(deadline)
            except queue.Empty:
                self._expected.clear()
                return not stop
            if isinstance(item, _Stop):
                stop = True
            elif isinstance(item, _Job):
                _settle(item)
            else:
                self._accept(item)

    def _next_item(self, deadline: float) -> _Job | _Feed | _Stop:
        if not self._feeds and not self._stopped:
            return self._inbox.get()
        if self._expected and not self._stopped:
            return self._inbox.get(timeout=max(0.0, deadline - time.monotonic()))
        return self._inbox.get_nowait()

    def _accept(self, feed: _Feed) -> None:
        session = feed.step.session
        self._expected.discard(session)
        if session not in self._feeds:
            self._begin(feed)
            return
        waiting = self._queued.setdefault(session, deque())
        if len(waiting) >= STEPS_QUEUED_MAX:
            full = f"{STEPS_QUEUED_MAX} steps of session {session} wait here"
            _fail(feed.future, Overloaded(full, retry_after_s=RETRY_AFTER_S))
        else:
            waiting.append(feed)

    def _begin(self, feed: _Feed) -> None:
        try:
            self._stage.begin(feed.step)
        except Exception as error:  # noqa: BLE001  (it belongs to the caller, and the thread lives on)
            _fail(feed.future, _named(error))
            self._begin_next(feed.step.session)
        else:
            self._feeds[feed.step.session] = feed

    def _begin_next(self, session: SessionId) -> None:
        waiting = self._queued.get(session)
        if not waiting:
            return
        feed = waiting.popleft()
        if not waiting:
            del self._queued[session]
        self._begin(feed)

    def _run_batch(self) -> None:
        chunks = batch.plan([(feed.step, feed.at) for feed in self._feeds.values()], self._rows_max)
        for chunk, result in zip(chunks, self._run(chunks), strict=True):
            self._deliver(chunk, result)

    def _run(self, chunks: list[Chunk]) -> list[StepResult | ShoalError]:
        """What a forward raises belongs to who caused it: the sessions of a batch that raised run again, each alone."""
        try:
            return self._stage.run(chunks)
        except Exception as error:  # noqa: BLE001  (it belongs to the callers, and the thread lives on)
            if len(chunks) == 1:
                return [_named(error)]
        return [result for chunk in chunks for result in self._run([chunk])]

    def _deliver(self, chunk: Chunk, result: StepResult | ShoalError) -> None:
        session = chunk.step.session
        feed = self._feeds[session]
        feed.at = chunk.end
        if isinstance(result, ShoalError):
            del self._feeds[session]
            self._stage.undo(chunk.step)
            _fail(feed.future, result)
            self._begin_next(session)
            return
        if result.rows is not None:
            feed.rows.append(result.rows)
        if chunk.ends_step:
            del self._feeds[session]
            self._expected.add(session)
            _settle(_Job(lambda: _joined(result, feed.rows), feed.future))
            self._begin_next(session)

    def _open(self, request: OpenSession) -> None:
        if len(self._stage) >= self._sessions_max:
            raise Overloaded(f"all {self._sessions_max} sessions of this stage are taken", retry_after_s=RETRY_AFTER_S)
        self._stage.open(request)

    def _raise_epoch(self, session: SessionId, expected: Epoch, epoch: Epoch) -> None:
        self._stage.raise_epoch(session, expected, epoch)
        self._give_up(session, Fenced(f"session {session} was raised to epoch {epoch} during a step"))

    def _truncate(self, session: SessionId, position: int) -> None:
        self._stage.truncate(session, position)
        self._give_up(session, Gap(f"session {session} was rewound to {position} during a step", held=position))

    def _close(self, session: SessionId, epoch: Epoch) -> None:
        self._stage.close(session, epoch)
        self._expected.discard(session)
        self._give_up(session, UnknownSession(f"session {session} was closed during a step"))

    def _give_up(self, session: SessionId, error: ShoalError) -> None:
        """Fails the step under way and those behind it."""
        under_way = self._feeds.pop(session, None)
        for feed in ([under_way] if under_way else []) + list(self._queued.pop(session, ())):
            _fail(feed.future, error)


def _settle(job: _Job) -> None:
    try:
        result = job.run()
    except Exception as error:  # noqa: BLE001  (it belongs to the caller, and the thread lives on)
        _fail(job.future, _named(error))
    else:
        _resolve(job.future, result)


def _resolve(future: Future[Any], result: object) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result)


def _fail(future: Future[Any], error: ShoalError) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


def _named(error: Exception) -> ShoalError:
    if isinstance(error, ShoalError):
        return error
    named = BrokenInvariant(f"{type(error).__name__} in a forward: {error}")
    named.__cause__ = error
    return named


def _joined(result: StepResult, rows: list[torch.Tensor]) -> StepResult:
    if len(rows) <= 1:
        return result
    return dataclasses.replace(result, rows=torch.cat(rows))
