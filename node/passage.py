"""One answer's passage through the stages of its route: opened, fed piece by piece, asked, closed.

Driven from trio, never waits; what comes of it is posted.  Laws: a stage that was asked to open is closed once the
answer leaves it; no more than PIECES_MAX pieces of a feed are on their way at once.
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import trio

from coordinator.session import Opened, StepFailed
from node import futures, rows
from node.bridge import await_future
from node.onward import Onward
from node.stage_wire import epoch_message, reply_of, step_message
from node.stages import ASK_S, At
from protos import messages
from protos import stage_pb2 as pb
from protos.errors import BrokenInvariant, ShoalError, UnknownSession
from protos.limits import RESUME_KEY_BYTES
from shard.batch import Step

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from coordinator.route import Route
    from coordinator.session import OpenStages, SendStep
    from node.collect import Collect
    from node.mail import Mail
    from node.stage_host import StageHost
    from node.stages import Stages
    from protos.epoch import Epoch
    from protos.ids import PeerId, SessionId
    from protos.sampling import SamplingParams

    Post = Callable[[Opened | StepFailed], None]

# A long prompt goes in pieces through a route of several stages, so that all of them compute at once: one batch of a
# worker each, and few enough that no stage's queue fills.
PIECE_ROWS = 256
PIECES_MAX = 6


@dataclass(frozen=True, slots=True, eq=False)
class _Entered:
    at: At
    epoch: Epoch
    future: Future[int]


class Passage:
    """`post` takes Opened or StepFailed in any thread; results come to the answer by mail."""

    def __init__(
        self,
        session: SessionId,
        door: Callable[[], At],
        params: SamplingParams,
        host: StageHost,
        stages: Stages,
        mail: Mail,
        collect: Collect,
        post: Post,
    ) -> None:
        """`door`: where it is when a route is opened; without address if nobody can call it."""
        self.hops: tuple[At, ...] = ()
        self.remote: dict[PeerId, int] = {}  # the other nodes of the route, and which stages they are
        self._session = session
        self._door = door
        self._params = params
        self._host = host
        self._stages = stages
        self._mail = mail
        self._collect = collect
        self._post = post
        self._resume_key = secrets.token_bytes(RESUME_KEY_BYTES)
        self._entered: dict[PeerId, _Entered] = {}
        # Those that a later route left out.  Their close may be under way when another route comes back to them: then
        # that raises the epoch, which fences the close, or finds nothing and opens.
        self._left: dict[PeerId, _Entered] = {}
        self._epoch: Epoch | None = None
        self._onward: Onward | None = None  # to the first stage, where that is not here
        self._feed: SendStep | None = None
        self._sent = self._computed = self._prompt_length = 0
        self._piece = min(PIECE_ROWS, rows.count_max(host.manifest))

    def open(self, effect: OpenStages, addresses: dict[PeerId, str], log: Sequence[int], prompt_length: int) -> None:
        """Opens the route's stages, or raises their epoch where the session is open already; leaves all others."""
        self._leave_first()
        self._epoch = effect.epoch
        self._feed = None
        self._prompt_length = prompt_length
        self.hops = tuple(At(stage.peer, addresses[stage.peer]) for stage in effect.route.stages)
        self.remote = {at.peer: number for number, at in enumerate(self.hops) if not self._stages.is_here(at)}
        door = self._door()
        comes = not door.address
        self._mail.route(self._session, effect.epoch, self.remote, len(self.hops) - 1, comes=comes)
        if comes:
            self._collect.enter(self._session, [self.hops[number] for number in self.remote.values()])
        if not self._stages.is_here(self.hops[0]):
            first = self.hops[0]
            self._onward = Onward(self._session, effect.epoch, 0, first.peer, first.address, self._mail.deliver)
            self._host.onwards.open(self._onward)
        for peer in set(self._entered) - {at.peer for at in self.hops}:
            gone = self._left[peer] = self._entered.pop(peer)
            self._stages.close(gone.at, self._session, effect.epoch, gone.future)
        request = self._request(effect, _route_message(effect.route, addresses, door), log)
        _All(
            self.hops,
            [self._enter(number, at, request) for number, at in enumerate(self.hops)],
            effect.epoch,
            self._post,
        )

    def feed(self, effect: SendStep) -> None:
        """Sends the feed's first pieces; what a stage refuses is posted."""
        self._feed = effect
        self._sent = self._computed = effect.start
        self._push()

    def progressed(self, epoch: Epoch, position: int) -> None:
        """The last stage has computed so far."""
        if self._feed is not None and epoch == self._epoch:
            self._computed = max(self._computed, position)
            self._push()

    async def suspects(self) -> frozenset[PeerId]:
        """Which other node is to blame that nothing comes: those that do not say what they hold, or else the first
        that holds less than it was fed."""
        if self._feed is None:
            return frozenset(peer for peer in self.remote if not self._entered[peer].future.done())
        until, epoch = self._feed.until, self._feed.epoch
        asked = [self._stages.held(at, self._session, epoch) for at in self.hops]
        with trio.move_on_after(ASK_S):
            for future in asked:
                try:
                    await await_future(future)
                except ShoalError:
                    continue
        found = [_value(future) for future in asked]
        silent = frozenset(at.peer for at, held in zip(self.hops, found, strict=True) if held is None)
        behind = [at.peer for at, held in zip(self.hops, found, strict=True) if held is not None and held < until]
        blamed = silent or frozenset(behind[:1]) or frozenset([self.hops[-1].peer])
        return blamed & self.remote.keys()

    def close(self, epoch: Epoch) -> list[Future[None]]:
        """Closes every stage; gives what becomes of those that are here, the others are closed in the background."""
        self._leave_first()
        here = []
        for entered in self._entered.values():
            closing = self._stages.close(entered.at, self._session, epoch, entered.future)
            if self._stages.is_here(entered.at):
                here.append(closing)
        self._entered.clear()
        return here

    def _leave_first(self) -> None:
        if self._onward is not None:
            self._host.onwards.forget(self._onward)
            self._onward = None

    def _push(self) -> None:
        feed = self._feed
        assert feed is not None, "pieces are sent of a feed"
        piece = self._piece if self.remote else feed.until
        while self._sent < feed.until and self._sent < self._computed + PIECES_MAX * piece:
            start, stop = self._sent, min(self._sent + piece, feed.until)
            self._sent = stop
            tokens = feed.tokens[start - feed.start : stop - feed.start]
            self._send(Step(self._session, feed.epoch, start, feed.until, tokens))

    def _send(self, step: Step) -> None:
        wants_rows = self._params.prompt_logprobs and step.until == self._prompt_length
        reply = reply_of(self._params.logprobs is not None, wants_rows)
        if self._onward is not None:
            self._host.onwards.send(self._onward, partial(step_message, step, reply, None), step.start)
            return
        try:
            self._host.feed(step, reply)
        except ShoalError as error:
            self._post(StepFailed(step.epoch, error, 0, self._host.me))

    def _enter(self, number: int, at: At, request: pb.OpenRequest) -> Future[int]:
        assert self._epoch is not None
        mine = pb.OpenRequest()
        mine.CopyFrom(request)
        mine.stage = number
        before = self._entered.get(at.peer) or self._left.pop(at.peer, None)
        if before is None:
            future = self._stages.open(at, mine)
        else:
            future = futures.after(before.future, partial(self._enter_again, before, mine))
        self._entered[at.peer] = _Entered(at, self._epoch, future)
        return future

    def _enter_again(self, before: _Entered, request: pb.OpenRequest, error: BaseException | None) -> Future[int]:
        """In any thread.  What became of the last try may be unknown: then it is closed, and opened anew."""
        if error is not None:
            epoch = before.epoch
            closed = self._stages.close(before.at, self._session, epoch)
            return futures.after(closed, lambda _: self._stages.open(before.at, request))
        raised = self._stages.raise_epoch(
            before.at,
            pb.RaiseEpochRequest(
                session_id=self._session,
                expected=epoch_message(before.epoch),
                epoch=request.epoch,
                resume_key=self._resume_key,
                route=request.route,
                stage=request.stage,
            ),
        )
        return futures.after(raised, lambda failed: self._open_if_gone(before.at, request, raised, failed))

    def _open_if_gone(
        self, at: At, request: pb.OpenRequest, raised: Future[int], error: BaseException | None
    ) -> Future[int]:
        return self._stages.open(at, request) if isinstance(error, UnknownSession) else raised

    def _request(self, effect: OpenStages, route: pb.Route, log: Sequence[int]) -> pb.OpenRequest:
        return pb.OpenRequest(
            session_id=self._session,
            epoch=epoch_message(effect.epoch),
            model_id=self._host.manifest.model_id,
            sampling=messages.sampling_message(self._params),
            prompt_ids=log[: self._prompt_length],
            generated_ids=log[self._prompt_length :],
            positions=effect.positions,
            resume_key_sha256=hashlib.sha256(self._resume_key).digest(),
            route=route,
        )


class _All:
    """Posts Opened when every stage has said what it holds, or the first refusal."""

    def __init__(self, hops: tuple[At, ...], entering: list[Future[int]], epoch: Epoch, post: Post) -> None:
        self._epoch = epoch
        self._post = post
        self._held: dict[int, int] = {}
        self._count = len(hops)
        self._failed = False
        self._lock = threading.Lock()
        for number, (at, future) in enumerate(zip(hops, entering, strict=True)):
            future.add_done_callback(partial(self._entered, number, at))

    def _entered(self, number: int, at: At, future: Future[int]) -> None:
        error = futures.error_of(future)
        with self._lock:
            first_failure = error is not None and not self._failed
            self._failed = self._failed or error is not None
            if error is None:
                self._held[number] = future.result()
            complete = len(self._held) == self._count
        if first_failure:
            named = error if isinstance(error, ShoalError) else BrokenInvariant(f"a stage could not be opened: {error}")
            self._post(StepFailed(self._epoch, named, number, at.peer))
        elif complete:
            self._post(Opened(self._epoch, tuple(self._held[n] for n in range(self._count))))


def _route_message(route: Route, addresses: dict[PeerId, str], door: At) -> pb.Route:
    stages = []
    for stage in route.stages:
        message = pb.RouteStage(
            peer=pb.Peer(peer_id=stage.peer, address=addresses[stage.peer]),
            first_layer=stage.first_layer,
            last_layer=stage.last_layer,
        )
        if stage.standby is not None and addresses.get(stage.standby):
            message.standby.CopyFrom(pb.Peer(peer_id=stage.standby, address=addresses[stage.standby]))
        stages.append(message)
    return pb.Route(stages=stages, door=pb.Peer(peer_id=door.peer, address=door.address))


def _value(future: Future[int]) -> int | None:
    """None: it has not come, or it failed."""
    return future.result() if future.done() and futures.error_of(future) is None else None
