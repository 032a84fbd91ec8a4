"""One layer's remote experts: asked of their holders in parallel, and of others when a call fails or is late.

Law: no expert is skipped or replaced.  Each is answered by whoever holds it, or, after `expert_wait_s`, its rows are
lost.  A late call stays valid: whichever good reply comes first counts, since they are equal.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Protocol

import torch

from node.expert_streams import Call, Ended, Ready, Replied
from node.expert_wire import raw
from protos import messages
from protos.errors import ExpertsUnreachable, NonFinite, ShoalError, ShuttingDown, Unavailable
from shard.experts import RowsLost

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coordinator.dispatch import Assignment
    from node.expert_streams import Event, ExpertStreams
    from node.expert_wire import ExpertWire
    from protos.ids import PeerId
    from shard.experts import Pairs, Part

# Experts that nobody could be asked for are tried again after so long, twice as long each time, and as soon as a peer
# is connected.
PAUSE_S = 0.05
PAUSE_S_MAX = 1.0
# Holders of one expert that are tried at a time, if none of them takes a call; the next ones are a pause later, so that
# a crowd of peers that say that they hold it does not keep the thread that computes.
HOLDERS_TRIED_MAX = 8


class Desk(Protocol):
    """What a layer asks of the port."""

    streams: ExpertStreams
    wire: ExpertWire
    wait_s: float

    def assign(self, layer: int, experts: list[int], avoid: dict[int, set[PeerId]]) -> Assignment: ...

    def news(self) -> list[Event]: ...

    def next_event(self, timeout_s: float) -> Event | None: ...

    def deadline_s(self, peer: PeerId, pairs: int) -> float: ...

    def failed(self, layer: int, peer: PeerId, error: ShoalError) -> None: ...

    def late(self, call: Call, now: float) -> None: ...

    def answered(self, event: Replied) -> None: ...

    def stale(self, event: Replied) -> None: ...

    def went_elsewhere(self, layer: int, peer: PeerId, error: ShoalError, *, late: bool) -> None: ...

    def connect(self, peer: PeerId, now: float) -> None: ...

    def sent(self, layer: int, peer: PeerId, pairs: int) -> None: ...


class Gather:
    """`compute_own` computes this node's part, while the others compute theirs."""

    def __init__(
        self,
        desk: Desk,
        me: PeerId,
        layer: int,
        hidden: torch.Tensor,
        pairs: Pairs,
        compute_own: Callable[[Part], torch.Tensor],
    ) -> None:
        self._desk = desk
        self._me = me
        self._layer = layer
        self._hidden = hidden
        self._pairs = pairs
        self._compute_own = compute_own
        self._rows = raw(hidden)
        self._began = time.monotonic()
        self._calls: dict[Call, list[int]] = {}  # that may still be answered, and their experts
        self._avoid: dict[int, set[PeerId]] = {}
        self._open: set[int] = set()  # experts without an answer
        self._stranded: set[int] = set()  # of them: nobody is asked for them now
        self._errors: dict[int, ShoalError] = {}
        self._retry_at = math.inf
        self._pause_s = PAUSE_S
        self._got: list[tuple[Part, torch.Tensor]] = []

    def run(self, assignment: Assignment) -> torch.Tensor:
        """[T, K, H].  Raises RowsLost, ShuttingDown, and what the own experts raise."""
        self._open.update(self._pairs.experts)
        self._ask(assignment)
        while self._open:
            self._step()
        return self._pairs.join(self._got, self._hidden)

    def _step(self) -> None:
        for come in self._desk.news():  # before the time is: this node may have computed meanwhile, for however long
            self._take(come)
        if not self._open:
            return
        now = time.monotonic()
        self._check(now)
        next_at = min((call.deadline for call in self._calls if not call.is_late), default=math.inf)
        event = self._desk.next_event(min(next_at, self._retry_at, self._began + self._desk.wait_s) - now)
        if event is not None:
            self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, Replied):
            self._replied(event)
        elif isinstance(event, Ended):
            self._ended(event.calls, event.error)
        elif isinstance(event, Ready) and self._stranded:
            for expert in self._stranded:
                self._avoid.get(expert, set()).discard(event.peer)
            self._retry_at = time.monotonic()

    def _check(self, now: float) -> None:
        """What time has done: calls that are late, experts to be tried again, the end of patience."""
        if self._desk.streams.closed:
            raise ShuttingDown("this node is leaving")
        if now >= self._began + self._desk.wait_s:
            raise self._lost()
        for call in [call for call in self._calls if not call.is_late and call.deadline <= now]:
            self._late(call, now)
        if now >= self._retry_at:
            self._again()

    def _again(self) -> None:
        """Tries stranded experts: at holders that had no turn yet, and where there are none, at all of them anew."""
        self._retry_at = math.inf
        stranded = sorted(self._stranded)
        self._stranded.clear()
        others = self._desk.assign(self._layer, stranded, self._avoid)
        anew, others.unheld = others.unheld, []
        for expert in anew:
            self._avoid.pop(expert, None)
        self._ask(others, self._desk.assign(self._layer, anew, self._avoid))

    def _ask(self, *assignments: Assignment) -> None:
        own: list[int] = []
        turn = list(assignments)
        for _ in range(HOLDERS_TRIED_MAX):
            turn = [others for assignment in turn for others in self._send_all(assignment, own)]
        for assignment in turn:
            if assignment.unheld:
                self._strand(assignment.unheld)
            if assignment.calls:
                self._strand([expert for experts in assignment.calls.values() for expert in experts], PAUSE_S)
        if own:
            part = self._pairs.part(own)
            self._got.append((part, self._compute_own(part)))
            self._open.difference_update(own)

    def _send_all(self, assignment: Assignment, own: list[int]) -> list[Assignment]:
        """Adds what is this node's to `own`; gives who else may be asked for what could not be sent."""
        own += assignment.calls.pop(self._me, [])
        refused: list[Assignment] = []
        for peer, experts in assignment.calls.items():
            for batch in self._desk.wire.split(self._pairs, experts):
                error = self._send(peer, batch)
                if error is not None and (others := self._others(peer, batch, error)) is not None:
                    refused.append(others)
        if assignment.unheld:
            self._strand(assignment.unheld)
        return refused

    def _send(self, peer: PeerId, experts: list[int]) -> ShoalError | None:
        """None: it was sent."""
        part = self._pairs.part(experts)
        pairs, now = len(part.pairs), time.monotonic()
        rows, left_s = self._rows, self._began + self._desk.wait_s - now
        try:
            self._desk.connect(peer, now)
            call = self._desk.streams.send(
                peer,
                pairs,
                self._desk.deadline_s(peer, pairs),
                now,
                lambda number: lambda: self._desk.wire.request(number, self._layer, rows, part, left_s),
            )
        except ShoalError as error:
            return error
        self._calls[call] = experts
        self._desk.sent(self._layer, peer, pairs)
        return None

    def _replied(self, event: Replied) -> None:
        experts = self._calls.pop(event.call, None)
        if experts is None:
            self._desk.stale(event)
            return
        try:
            rows = self._read(event, experts)
        except ShoalError as error:
            self._desk.failed(self._layer, event.call.peer, error)
            self._elsewhere(event.call.peer, experts, error)
            return
        self._desk.answered(event)
        wanted = [expert for expert in experts if expert in self._open]
        if wanted == experts:
            self._got.append((self._pairs.part(experts), rows))
        else:
            self._keep(experts, wanted, rows)
        self._open.difference_update(experts)
        self._stranded.difference_update(experts)

    def _keep(self, experts: list[int], wanted: list[int], rows: torch.Tensor) -> None:
        """Of a reply, what is still without an answer: a part of it came from elsewhere first."""
        counts = [self._pairs.count(expert) for expert in experts]
        for expert, part in zip(experts, rows.split_with_sizes(counts), strict=True):
            if expert in wanted:
                self._got.append((self._pairs.part([expert]), part))

    def _read(self, event: Replied, experts: list[int]) -> torch.Tensor:
        if event.reply.HasField("failed"):
            raise messages.error(event.reply.failed)
        try:
            return self._desk.wire.replies(event.reply.rows, event.call.pairs)
        except NonFinite:
            if bool(torch.isfinite(self._hidden).all()):
                raise
        # What was not finite before it left is not the peer's fault; the stage finds it where it always does.
        return self._desk.wire.replies(event.reply.rows, event.call.pairs, finite=False)

    def _ended(self, calls: Iterable[Call], error: ShoalError) -> None:
        for call in calls:
            experts = self._calls.pop(call, None)
            if experts is not None:
                self._elsewhere(call.peer, experts, error)

    def _late(self, call: Call, now: float) -> None:
        self._desk.late(call, now)
        error = Unavailable(f"the peer {call.peer[:8]} has not answered within {now - call.sent_at:.2f} s")
        self._elsewhere(call.peer, self._calls[call], error, late=True)

    def _elsewhere(self, peer: PeerId, experts: list[int], error: ShoalError, *, late: bool = False) -> None:
        """Asks the next replicas, because this one did not answer, or has not yet."""
        others = self._others(peer, experts, error)
        if others is None:
            return
        if others.calls:
            self._desk.went_elsewhere(self._layer, peer, error, late=late)
        self._ask(others)

    def _others(self, peer: PeerId, experts: list[int], error: ShoalError) -> Assignment | None:
        """The next replicas for what is still open, unless another call for it is under way."""
        asked = {expert for call, asked in self._calls.items() if not call.is_late for expert in asked}
        left = [expert for expert in experts if expert in self._open and expert not in asked]
        for expert in left:
            self._errors[expert] = error
            self._avoid.setdefault(expert, set()).add(peer)
        return self._desk.assign(self._layer, left, self._avoid) if left else None

    def _strand(self, experts: list[int], pause_s: float | None = None) -> None:
        """Nobody is asked for them now: a late call may still be answered, and all are tried again."""
        self._stranded.update(experts)
        if pause_s is not None:
            self._retry_at = min(self._retry_at, time.monotonic() + pause_s)
        elif math.isinf(self._retry_at):
            self._retry_at = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, PAUSE_S_MAX)

    def _lost(self) -> RowsLost:
        lost: dict[int, ExpertsUnreachable] = {}
        for expert in sorted(self._open):
            error = self._errors.get(expert)
            why = f": {error}" if error else ""
            reason = ExpertsUnreachable(
                f"no replica of expert {expert} of layer {self._layer} answered within {self._desk.wait_s:g} s{why}",
                retry_after_s=1.0,
            )
            for row in self._pairs.rows_of([expert]):
                lost.setdefault(row, reason)
        return RowsLost(lost)
