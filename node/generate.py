"""The door: one answer from its admission to its last event.  Drives coordinator.session; decides nothing.

Law: whatever happens to an answer (its end, an error, a client that left, a node that stops), its stages are closed,
its place is given back, and a client that still listens gets one Finished or Failed; before Started, an error is raised
instead.
"""

from __future__ import annotations

import math
import secrets
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from coordinator import route
from coordinator.session import (
    Cancelled,
    CloseStages,
    DeadlinePassed,
    Emit,
    Fail,
    Finish,
    Opened,
    OpenStages,
    Routed,
    SendStep,
    Session,
    StepFailed,
    StopStringFound,
    TokenArrived,
)
from coordinator.view import Load, Record, View
from node import log
from node.bridge import await_future
from node.wording import Wording
from protos import inference_pb2 as pb
from protos import messages
from protos.errors import DeadlineExceeded, ShoalError, ShuttingDown
from protos.ids import PeerId, SessionId
from shard.batch import Step
from shard.stage import OpenSession

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    from coordinator.session import Effect, Event, FinishReason
    from node.config import Config
    from node.gate import Gate
    from node.request import Ask
    from node.text import Text
    from protos.epoch import Epoch
    from protos.manifest import Manifest
    from shard.stage import StepResult

    Send = Callable[[pb.GenerateEvent], Awaitable[None]]

# An answer's end waits so long for its stage to free the KV: a batch that runs goes first.
CLOSE_WAIT_S = 30.0
# A client that must be told of a failure gets so long to read what is before it.
FAREWELL_S = 2.0

_REASONS: Final = {
    "stop": pb.Finished.STOP,
    "length": pb.Finished.LENGTH,
    "stop_string": pb.Finished.STOP_STRING,
}


class Compute(Protocol):
    """What computes: shard.worker.Worker, and a toy in tests."""

    def open(self, request: OpenSession) -> Future[None]: ...
    def step(self, step: Step) -> Future[StepResult]: ...
    def close(self, session: SessionId, epoch: Epoch) -> Future[None]: ...


class Door:
    """Answers requests with one model that this node holds whole."""

    def __init__(
        self, peer: PeerId, manifest: Manifest, text: Text, worker: Compute, gate: Gate, config: Config
    ) -> None:
        self.peer = peer
        self.manifest = manifest
        self.text = text
        self.worker = worker
        self.gate = gate
        self.config = config
        self._answers: set[_Answer] = set()
        self._leaving: ShuttingDown | None = None

    async def generate(self, ask: Ask, send: Send) -> None:
        """Sends the answer's events.  Raises what happens before Started.  Cancelled means that the client is gone."""
        if self._leaving is not None:
            raise self._leaving
        answer = _Answer(self, ask, send)
        self._answers.add(answer)
        try:
            await answer.run()
        finally:
            self._answers.discard(answer)

    def leave(self) -> None:
        """Refuses what is new, and ends what runs with ShuttingDown."""
        self._leaving = ShuttingDown("this node is shutting down; ask another one, or try again when it is back")
        for answer in list(self._answers):
            answer.stop(self._leaving)

    def plan(self) -> route.Route:
        """A route through the peers of the view: for now this node alone."""
        layers = self.manifest.layers
        record = Record(frozenset(range(layers)), embed=True, head=True)
        view = View({self.peer: record}, {self.peer: Load(queue=self.gate.running)})
        return route.plan(view, route.Shape(layers, self.manifest.grain), secrets.randbits(64))


class _Answer:
    """The driver of one session's core."""

    def __init__(self, door: Door, ask: Ask, send: Send) -> None:
        self._door = door
        self._ask = ask
        self._send = send
        self._id = SessionId(secrets.token_hex(16))
        self._core = Session(
            ask.prompt,
            ask.params,
            door=door.peer,
            context=door.manifest.context,
            recompute_at=door.manifest.recompute_at,
            step_deadline_s=door.config.step_deadline_s,
        )
        self._wording = Wording(door.text, ask.stop)
        self._scope = trio.CancelScope()
        self._stopped_by: ShoalError | None = None
        self._in_flight: Future[Any] | None = None
        self._closing: Future[None] | None = None
        self._started = False
        self._ended_as = ""
        self._clock = _Clock()

    def stop(self, error: ShoalError) -> None:
        """Ends the answer with an error, wherever it is."""
        self._stopped_by = error
        self._scope.cancel()

    async def run(self) -> None:
        try:
            with self._scope:
                async with self._door.gate.admitted(self._id):
                    await self._run_admitted()
            if self._scope.cancelled_caught and self._stopped_by is not None:
                await self._fail(self._stopped_by)
        finally:
            self._log()

    async def _run_admitted(self) -> None:
        self._clock.admit()
        try:
            await self._drive(self._routed())
        finally:
            await self._close()

    async def _drive(self, event: Event) -> None:
        while True:
            for effect in self._core.handle(event, trio.current_time()):
                await self._execute(effect)
            if self._core.ended:
                return
            if self._wording.stopped:
                event = StopStringFound()
            else:
                event = await self._next()

    def _routed(self) -> Event:
        try:
            return Routed(self._door.plan())
        except ShoalError as error:
            return StepFailed(self._core.epoch, error)

    async def _next(self) -> Event:
        deadline = self._core.deadline
        with trio.move_on_at(math.inf if deadline is None else deadline):
            return await self._arrival()
        return DeadlinePassed()

    async def _arrival(self) -> Event:
        """What the open or the step in flight comes to."""
        assert self._in_flight is not None
        epoch = self._core.epoch
        try:
            result = await await_future(self._in_flight)
        except ShoalError as error:
            return StepFailed(epoch, error)
        if result is None:
            return Opened(epoch, (0,))
        assert result.token is not None, "the last stage's final rows give a token"
        return TokenArrived(
            result.epoch, result.position, result.token, result.logprob, result.top, result.prompt_logprobs
        )

    async def _execute(self, effect: Effect) -> None:
        match effect:
            case OpenStages():
                self._open(effect)
            case SendStep():
                self._in_flight = self._door.worker.step(
                    Step(
                        session=self._id,
                        epoch=effect.epoch,
                        start=effect.start,
                        until=effect.until,
                        tokens=effect.tokens,
                    )
                )
                await self._start()
            case Emit():
                await self._emit(effect)
            case CloseStages():
                self._closing = self._door.worker.close(self._id, effect.epoch)
            case Finish():
                await self._finish(effect)
            case Fail():
                await self._fail(effect.error)

    def _open(self, effect: OpenStages) -> None:
        core = self._core
        self._in_flight = self._door.worker.open(
            OpenSession(
                session=self._id,
                epoch=effect.epoch,
                log=tuple(core.log),
                prompt_len=core.prompt_length,
                params=self._ask.params,
                positions=effect.positions,
            )
        )

    async def _start(self, prompt_logprobs: tuple[float, ...] | None = None) -> None:
        """Tells the client that its answer runs; with the prompt's logprobs once they are there, if it wants them."""
        if self._started or (self._ask.params.prompt_logprobs and prompt_logprobs is None):
            return
        self._started = True
        started = pb.Started(
            session_id=self._id,
            model_id=self._door.manifest.model_id,
            prompt_tokens=self._core.prompt_length,
            prompt_logprobs=prompt_logprobs,
        )
        await self._tell(pb.GenerateEvent(started=started))

    async def _emit(self, effect: Emit) -> None:
        await self._start(effect.prompt_logprobs or ())
        self._clock.token()
        text = self._wording.add(effect.token, is_last=self._core.ended)
        top = [pb.TopLogprob(id=token, text=self._wording.of(token), logprob=value) for token, value in effect.top]
        token = pb.Token(id=effect.token, text=text, logprob=effect.logprob, top=top, position=effect.position)
        await self._tell(pb.GenerateEvent(token=token))

    async def _finish(self, effect: Finish) -> None:
        # A stop string that the last token completes names the reason, as it would have one token earlier.
        reason: FinishReason = "stop_string" if self._wording.stopped else effect.reason
        self._ended_as = reason
        if reason in _REASONS:
            finished = pb.Finished(
                reason=_REASONS[reason], generated=self._core.generated, timings=self._clock.timings()
            )
            await self._tell(pb.GenerateEvent(finished=finished))

    async def _fail(self, error: ShoalError) -> None:
        self._ended_as = error.code
        if not self._started:
            raise error
        with trio.move_on_after(FAREWELL_S, shield=True):
            await self._send(pb.GenerateEvent(failed=messages.failed(error)))

    async def _tell(self, event: pb.GenerateEvent) -> None:
        with trio.move_on_after(self._door.config.client_wait_s) as patience:
            await self._send(event)
        if patience.cancelled_caught:
            raise ClientStalled(
                f"the client did not read for {self._door.config.client_wait_s:g} s (client_wait_s): its answer is over"
            )

    async def _close(self) -> None:
        """Frees the stages, also when the answer was cancelled."""
        if not self._core.ended:
            for effect in self._core.handle(Cancelled(), trio.current_time()):
                if isinstance(effect, CloseStages):
                    self._closing = self._door.worker.close(self._id, effect.epoch)
        if self._closing is not None:
            with trio.move_on_after(CLOSE_WAIT_S, shield=True):
                await self._closed(self._closing)

    async def _closed(self, closing: Future[None]) -> None:
        try:
            await await_future(closing)
        except ShoalError as error:
            log.get("door").warning(
                "a session could not be closed", session=self._id, code=error.code, error=str(error)
            )

    def _log(self) -> None:
        timings = self._clock.timings()
        generated = self._core.generated
        log.get("door").info(
            "answer",
            session=self._id,
            ended_as=self._ended_as or "cancelled",
            prompt_tokens=self._core.prompt_length,
            tokens=generated,
            tokens_per_s=round((generated - 1) / timings.decode_s, 2) if timings.decode_s > 0 else None,
            first_token_s=round(timings.queue_s + timings.prefill_s, 4),
        )


class ClientStalled(DeadlineExceeded):
    """A client does not read its answer; there is nobody to tell."""


class _Clock:
    """When what happened to an answer, in trio's seconds."""

    def __init__(self) -> None:
        self._asked = trio.current_time()
        self._admitted: float | None = None
        self._first: float | None = None
        self._last: float | None = None

    def admit(self) -> None:
        self._admitted = trio.current_time()

    def token(self) -> None:
        self._last = trio.current_time()
        if self._first is None:
            self._first = self._last

    def timings(self) -> pb.Timings:
        if self._admitted is None:
            return pb.Timings(queue_s=trio.current_time() - self._asked)
        first = trio.current_time() if self._first is None else self._first
        return pb.Timings(
            queue_s=self._admitted - self._asked,
            prefill_s=first - self._admitted,
            decode_s=0.0 if self._last is None else self._last - first,
        )
