"""The door: one answer from its admission to its last event.  Drives coordinator.session; decides nothing.

Law: whatever happens to an answer (its end, an error, a client that left, a node that stops), its stages are closed,
its place is given back, and a client that still listens gets one Finished or Failed; before Started, an error is raised
instead.
"""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

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
    Plan,
    Routed,
    SendStep,
    Session,
    State,
    StepFailed,
    StopStringFound,
    Tell,
    TokenArrived,
    is_held_against,
)
from coordinator.view import Load
from node import log
from node.bridge import Inbox, await_future
from node.collect import Collect
from node.mail import Mail
from node.passage import Passage
from node.stage_wire import StageFailed, StageNotice, named
from node.stages import At, Stages
from node.wording import Wording
from protos import inference_pb2 as pb
from protos import messages
from protos.errors import DeadlineExceeded, ShoalError, ShuttingDown
from protos.ids import PeerId, SessionId
from shard.stage import StepResult

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    from coordinator.session import Effect, Event, FinishReason
    from coordinator.view import View
    from node.config import Config
    from node.gate import Gate
    from node.link import Links
    from node.request import Ask
    from node.stage_host import StageHost
    from node.stage_wire import Result
    from node.text import Text
    from protos.ids import ModelId
    from protos.manifest import Manifest

    Send = Callable[[pb.GenerateEvent], Awaitable[None]]

# An answer's end waits so long for the stage here to free the KV: a batch that runs goes first.
CLOSE_WAIT_S = 30.0
# A client that must be told of a failure gets so long to read what is before it.
FAREWELL_S = 2.0
JOIN_S = 2.0
# What threads have told an answer and it has not looked at: pieces of one feed, failures, notices.
INBOX_MAX = 256
# Of one answer and kind, late replies and failures; a swarm that has more of them has no news for its client.
NOTICES_MAX = 64

_REASONS: Final = {
    "stop": pb.Finished.STOP,
    "length": pb.Finished.LENGTH,
    "stop_string": pb.Finished.STOP_STRING,
}


class Swarm(Protocol):
    """What is known of the peers: node.peers.Peers, and a toy in tests."""

    @property
    def me(self) -> PeerId: ...
    @property
    def called_at(self) -> str: ...
    def view(self, model_id: ModelId) -> View: ...
    def failed(self, peer: PeerId, error: ShoalError) -> None: ...
    def heard(self, peer: PeerId) -> None: ...


class Door:
    """Answers requests with one model, whose stages may be anywhere.  `links`: for calls to stages elsewhere."""

    def __init__(
        self, peers: Swarm, manifest: Manifest, text: Text, host: StageHost, links: Links, gate: Gate, config: Config
    ) -> None:
        self.peers = peers
        self.manifest = manifest
        self.text = text
        self.host = host
        self.gate = gate
        self.config = config
        self.mail = Mail()
        self.stages = Stages(host, links)
        self.collect = Collect(links, manifest, self.mail)
        host.deliver_to(self.mail.deliver)
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

    def shutdown(self) -> None:
        """After the last answer: ends the calls to stages.  Blocks for some seconds at most."""
        self.collect.close(JOIN_S)
        self.stages.shutdown()

    @property
    def queue(self) -> int:
        """How busy this node is, in sessions: its own answers, or those whose stages it computes, if these are more."""
        return max(self.gate.running, len(self.host))

    def plan(self, avoid: frozenset[PeerId]) -> tuple[route.Route, dict[PeerId, str]]:
        """A route through the peers of the view, and where they are.  Raises UnitMissing."""
        view = self.peers.view(self.manifest.model_id)
        view = replace(view, loads={**view.loads, self.peers.me: Load(queue=self.queue)})
        shape = route.Shape(self.manifest.layers, self.manifest.experts)
        found = route.plan(view, shape, secrets.randbits(64), avoid, self.peers.me)
        return found, {peer: record.address for peer, record in view.records.items()}


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
            door=door.peers.me,
            context=door.manifest.context,
            recompute_at=door.manifest.recompute_at,
            step_deadline_s=door.config.step_deadline_s,
            repair_wait_s=door.config.repair_wait_s,
            expert_wait_s=door.config.expert_wait_s,
        )
        self._wording = Wording(door.text, ask.stop)
        self._scope = trio.CancelScope()
        self._stopped_by: ShoalError | None = None
        self._inbox: Inbox[Event | Result] = Inbox(INBOX_MAX)
        self._passage = Passage(
            self._id,
            lambda: At(door.peers.me, door.peers.called_at),
            ask.params,
            door.host,
            door.stages,
            door.mail,
            door.collect,
            self._inbox.put,
        )
        self._addresses: dict[PeerId, str] = {}
        self._planned: Event | None = None
        self._closing: list[Future[None]] = []
        self._notices: list[pb.Notice] = []  # for a client that has not had its Started
        self._notices_left = {False: NOTICES_MAX, True: NOTICES_MAX}  # by `late`
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
            if self._scope.cancelled_caught and self._stopped_by is not None and not self._started:
                await self._fail(self._stopped_by)
        finally:
            self._log()

    async def _run_admitted(self) -> None:
        self._clock.admit()
        self._door.mail.expect(self._id, self._inbox.put)
        try:
            await self._drive(self._plan(frozenset()))
        except trio.Cancelled:
            # Before the stages are free: that may take longer than a node that leaves has.
            if self._stopped_by is not None and self._started:
                await self._fail(self._stopped_by)
            raise
        finally:
            self._door.mail.forget(self._id)
            self._door.collect.leave(self._id)
            await self._close()

    async def _drive(self, event: Event) -> None:
        while True:
            for effect in self._core.handle(event, trio.current_time()):
                await self._execute(effect)
            if self._core.ended:
                return
            event = StopStringFound() if self._wording.stopped else await self._next()

    def _plan(self, avoid: frozenset[PeerId]) -> Event:
        try:
            found, self._addresses = self._door.plan(avoid)
        except ShoalError as error:
            return StepFailed(self._core.epoch, error)
        return Routed(found)

    async def _next(self) -> Event:
        if self._planned is not None:
            planned, self._planned = self._planned, None
            return planned
        while True:
            deadline = self._core.deadline
            with trio.move_on_at(math.inf if deadline is None else deadline):
                if (event := await self._read(await self._inbox.get())) is not None:
                    return event
                continue
            suspects = await self._suspects()
            if not len(self._inbox):  # or it came while the stages were asked
                return DeadlinePassed(suspects)

    async def _suspects(self) -> frozenset[PeerId]:
        if self._is_under_way and self._passage.remote:
            return await self._passage.suspects()
        return frozenset()

    async def _read(self, item: Event | Result) -> Event | None:
        """What has come, as the core's event, if it is one."""
        match item:
            case StepResult():
                return self._token(item)
            case StageFailed():
                return self._failure(item)
            case StageNotice():
                await self._notice(item.code, item.message, item.peer, late=item.late)
                return None
            case StepFailed():
                self._score(item.peer, item.error, opening=True)
                return item if self._is_under_way else None
            case Opened():
                for peer in self._passage.remote:
                    self._door.peers.heard(peer)
                return item if self._core.state is State.OPENING else None
            case _:
                return item

    @property
    def _is_under_way(self) -> bool:
        """A failure may be told by several stages: what comes after the first is of a state that has passed."""
        return self._core.state in (State.OPENING, State.FEEDING)

    def _token(self, result: StepResult) -> Event | None:
        if self._core.state is not State.FEEDING or result.epoch != self._core.epoch:
            return None
        if result.token is None or result.position > len(self._core.log):
            self._passage.progressed(result.epoch, result.position)
            return None
        return TokenArrived(
            result.epoch, result.position, result.token, result.logprob, result.top, result.prompt_logprobs
        )

    def _failure(self, failed: StageFailed) -> Event | None:
        if not self._is_under_way or failed.epoch != self._core.epoch or failed.stage >= len(self._passage.hops):
            return None
        at = self._passage.hops[failed.stage]
        error = failed.error
        if at.peer != self._door.peers.me:
            error = named(error, at.peer, at.address)
            self._score(at.peer, error, opening=failed.fetching or self._core.state is State.OPENING)
        return StepFailed(failed.epoch, error, failed.stage, at.peer)

    def _score(self, peer: PeerId | None, error: ShoalError, *, opening: bool) -> None:
        if peer is not None and peer != self._door.peers.me and is_held_against(error, opening=opening):
            self._door.peers.failed(peer, error)

    async def _execute(self, effect: Effect) -> None:
        match effect:
            case Plan():
                self._planned = self._plan(effect.avoid)
            case OpenStages():
                self._passage.open(effect, self._addresses, self._core.log, self._core.prompt_length)
            case SendStep():
                self._passage.feed(effect)
                await self._start()
            case Emit():
                await self._emit(effect)
            case Tell():
                await self._notice(effect.code, effect.message, effect.peer)
            case CloseStages():
                self._closing = self._passage.close(effect.epoch)
            case Finish():
                await self._finish(effect)
            case Fail():
                await self._fail(effect.error)

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
        for notice in self._notices:
            await self._tell(pb.GenerateEvent(notice=notice))

    async def _notice(self, code: str, message: str, peer: PeerId | None, *, late: bool = False) -> None:
        logger = log.get("door")
        say = logger.info if late else logger.warning
        say("an answer goes on", session=self._id, code=code, error=message, peer=peer)
        if self._notices_left[late] == 0:
            return
        self._notices_left[late] -= 1
        notice = pb.Notice(code=code, message=message, peer_id=peer or "", position=len(self._core.log), late=late)
        if self._started:
            await self._tell(pb.GenerateEvent(notice=notice))
        else:
            self._notices.append(notice)

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
        """Frees the stages, also when the answer was cancelled; it waits for what is here alone."""
        if not self._core.ended:
            for effect in self._core.handle(Cancelled(), trio.current_time()):
                if isinstance(effect, CloseStages):
                    self._closing = self._passage.close(effect.epoch)
        if self._stopped_by is not None and not self._started:
            return  # its error is raised to the client at once; the node frees its stages as it leaves
        with trio.move_on_after(CLOSE_WAIT_S, shield=True):
            for closing in self._closing:
                await self._closed(closing)

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
