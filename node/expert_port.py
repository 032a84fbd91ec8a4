"""The port to the experts that knows the network: own experts are computed here, the others at their holders.

Called only in the thread that computes, and out of trio.  Law: what a peer does, or does not do, changes who computes
an expert and when its answer comes, never what it is.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from coordinator.view import Health
from node import log
from node.expert_gather import Gather
from node.expert_streams import Call, Ended, ExpertStreams, Ready, Replied
from node.expert_wire import ExpertWire
from protos.errors import ShoalError
from protos.inference_pb2 import LayerWork, Notice
from protos.limits import FRAME_BYTES_MAX
from shard.experts import Pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from coordinator.dispatch import Assignment, Dispatch
    from coordinator.health import PeerHealth
    from coordinator.view import View
    from node.expert_streams import Event
    from node.link import Links
    from protos.ids import PeerId
    from protos.manifest import Manifest
    from shard.experts import ExpertBank, Part

# How old a view may be; what happens to this port's own streams counts at once.
REFRESH_S = 0.2
# A late reply's time, in deadlines, as it enters the peer's history: a frozen peer that goes on is no slow one.
LATE_DEADLINES_MAX = 2.0
_CALLS, _PAIRS, _RETRIED, _STEPS = range(4)


class ExpertPort:
    """`on_notice` hears, in the computing thread, of the first call of a peer that went elsewhere because it was late,
    and of the first one because it failed, until it is well."""

    def __init__(
        self,
        manifest: Manifest,
        bank: ExpertBank,
        dispatch: Dispatch,
        health: PeerHealth,
        links: Links,
        view: Callable[[], View],
        *,
        me: PeerId,
        expert_wait_s: float = 10.0,
        frame_bytes_max: int = FRAME_BYTES_MAX,
    ) -> None:
        self.on_notice: Callable[[Notice], None] | None = None
        self.wait_s = expert_wait_s
        self.wire = ExpertWire(manifest, frame_bytes_max=frame_bytes_max)
        self.streams = ExpertStreams(links)
        self._me = me
        self._counts = manifest.experts
        self._bank = bank
        self._dispatch = dispatch
        self._health = health
        self._view = view
        self._addresses: dict[PeerId, str] = {}
        self._whole: dict[int, bool] = {}  # layers that were asked for: are all their experts here?
        self._refresh_at = 0.0
        self._told: dict[PeerId, bool] = {}  # of whom a notice was given: only of being late?
        self._work: dict[tuple[int, PeerId], list[int]] = {}

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """See shard.experts.Experts.  Raises RowsLost for rows that no replica answered within `expert_wait_s`."""
        whole = self._whole.get(layer)
        if whole is None:
            whole = self._begin(layer)
        own = self._of(layer, self._me)
        own[_STEPS] += 1
        if whole:
            own[_CALLS] += 1
            own[_PAIRS] += index.numel()
            return self._bank(layer, hidden, index)
        self._catch_up()
        pairs = Pairs(index)
        assignment = self.assign(layer, pairs.experts, {})
        return Gather(self, self._me, layer, hidden, pairs, partial(self._own, layer, hidden)).run(assignment)

    def work(self) -> list[LayerWork]:
        """Who computed for the stages here, by layer and peer.  From any thread."""
        return [
            LayerWork(layer=layer, peer_id=peer, calls=calls, pairs=pairs, retried=retried, steps=steps)
            for (layer, peer), (calls, pairs, retried, steps) in sorted(self._work.copy().items())
        ]

    def close(self) -> None:
        """From any thread: ends all streams; a layer that waits fails with ShuttingDown."""
        self.streams.close()

    # What a layer asks of the port (node.expert_gather.Desk)

    def assign(self, layer: int, experts: list[int], avoid: dict[int, set[PeerId]]) -> Assignment:
        if time.monotonic() >= self._refresh_at:
            self._refresh()
        return self._dispatch.assign(layer, experts, avoid)

    def next_event(self, timeout_s: float) -> Event | None:
        event = self.streams.wait(timeout_s)
        if isinstance(event, Ready):
            self._health.heard(event.peer, time.monotonic())
            self._refresh_at = 0.0
        elif isinstance(event, Ended):
            if not event.is_ours:
                self._health.failed(event.peer, event.error, time.monotonic())
            self._refresh_at = 0.0
        return event

    def news(self) -> list[Event]:
        found: list[Event] = []
        while self.streams.has_news():
            if (event := self.next_event(0)) is not None:
                found.append(event)
        return found

    def connect(self, peer: PeerId, now: float) -> None:
        self.streams.connect(peer, self._addresses.get(peer, ""), now)

    def deadline_s(self, peer: PeerId, pairs: int) -> float:
        return self._health.deadline_s(peer, pairs)

    def sent(self, layer: int, peer: PeerId, pairs: int) -> None:
        done = self._of(layer, peer)
        done[_CALLS] += 1
        done[_PAIRS] += pairs

    def answered(self, event: Replied) -> None:
        call = event.call
        latency_s = min(event.at - call.sent_at, LATE_DEADLINES_MAX * (call.deadline - call.sent_at))
        self._health.succeeded(call.peer, latency_s, call.pairs, time.monotonic())
        if call.is_late:
            self._refresh_at = 0.0
        if self._told:
            self._told.pop(call.peer, None)

    def stale(self, event: Replied) -> None:
        """A reply that nobody waits for any more says that its peer answers again."""
        if event.reply.HasField("rows"):
            self.answered(event)

    def failed(self, layer: int, peer: PeerId, error: ShoalError) -> None:
        self._health.failed(peer, error, time.monotonic())
        self._refresh_at = 0.0

    def late(self, call: Call, now: float) -> None:
        call.is_late = True
        self._health.late(call.peer, now)
        self._refresh_at = 0.0

    def went_elsewhere(self, layer: int, peer: PeerId, error: ShoalError, *, late: bool) -> None:
        self._of(layer, peer)[_RETRIED] += 1
        only_late = self._told.get(peer)
        if only_late is not None and (late or not only_late):
            return
        self._told[peer] = late
        logger = log.get("experts")
        say = logger.info if late else logger.warning
        say("calls go to other replicas", peer=peer, layer=layer, error=str(error))
        if self.on_notice is not None:
            message = f"what peer {peer[:8]} was to compute is asked of other holders: {error}"
            self.on_notice(Notice(code=error.code, message=message, peer_id=peer, late=late))

    def _begin(self, layer: int) -> bool:
        whole = all(self._bank.holds(layer, expert) for expert in range(self._counts[layer]))
        self._whole[layer] = whole
        self._refresh_at = 0.0  # its holders are to be connected
        return whole

    def _own(self, layer: int, hidden: torch.Tensor, part: Part) -> torch.Tensor:
        self.sent(layer, self._me, len(part.pairs))
        return self._bank.rows(layer, hidden, part)

    def _of(self, layer: int, peer: PeerId) -> list[int]:
        found = self._work.get((layer, peer))
        if found is None:
            found = self._work[layer, peer] = [0, 0, 0, 0]
        return found

    def _catch_up(self) -> None:
        """What happened since the last layer."""
        for event in self.news():
            if isinstance(event, Replied):
                self.stale(event)

    def _refresh(self) -> None:
        """Takes a new view, connects to whoever holds what is asked for, and ranks those last that are not free."""
        now = time.monotonic()
        self._refresh_at = now + REFRESH_S
        view = self._view()
        asked = [layer for layer, whole in self._whole.items() if not whole]
        health: dict[PeerId, Health] = {}
        for peer, record in view.records.items():
            if peer == self._me or not any(record.experts.get(layer) for layer in asked):
                continue
            self._addresses[peer] = record.address
            health[peer] = max(view.health_of(peer), self._health.state(peer, now))
            if health[peer] is not Health.DEAD:
                with contextlib.suppress(ShoalError):
                    self.connect(peer, now)
            if not self.streams.is_free(peer, now):
                health[peer] = Health.DEAD
        for peer in self.streams.peers():
            if peer not in health:
                self.streams.drop(peer)
                self._addresses.pop(peer, None)
        self._dispatch.update(replace(view, health=health))
