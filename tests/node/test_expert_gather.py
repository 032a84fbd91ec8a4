"""One layer's calls with a desk whose peers, clock and events are a test's (PROTOCOL.md, section 10.3)."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from coordinator.dispatch import Dispatch
from coordinator.view import Health, Record, View
from node import expert_gather
from node.expert_gather import HOLDERS_TRIED_MAX, PAUSE_S, PAUSE_S_MAX, Gather
from node.expert_streams import Call, Ended, Ready, Replied
from protos import expert_pb2 as pb
from protos.errors import ExpertsUnreachable, PeerLost, ShoalError
from protos.ids import PeerId
from shard.experts import Pairs, RowsLost

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coordinator.dispatch import Assignment
    from node.expert_streams import Event
    from shard.experts import Part

ME, PEER, OTHER = PeerId("me"), PeerId("b"), PeerId("c")
EXPERTS = 8
WAIT_S = 10.0
DEADLINE_S = 0.1
HOLDERS = 1024


class Desk:
    """Peers take every call but those in `broken`, and answer once `answers`; time passes where a test says so, and
    while the layer waits."""

    def __init__(self, held: Mapping[PeerId, Sequence[int]]) -> None:
        self.now = 1000.0
        self.wait_s = WAIT_S
        self.answers = False
        self.broken: set[PeerId] = set()
        self.events: deque[Event] = deque()
        self.calls: list[PeerId] = []
        self.tried: Counter[float] = Counter()  # calls by time
        self.open: list[Call] = []
        self.later: list[Call] = []
        self.sent_elsewhere: list[PeerId] = []
        self.errors: list[tuple[PeerId, str]] = []
        self.latencies_s: list[float] = []
        self.streams: Any = SimpleNamespace(closed=False, send=self._send)
        self.wire: Any = SimpleNamespace(
            split=lambda pairs, experts: [experts], replies=lambda data, count, finite=True: torch.zeros(count, 4)
        )
        self._numbers = itertools.count(1)
        self._dispatch = Dispatch(ME, [EXPERTS])
        masks = {peer: sum(1 << expert for expert in experts) for peer, experts in held.items()}
        self._records = {peer: Record(address=peer, experts={0: mask}) for peer, mask in masks.items()}
        self._dispatch.update(View(self._records))

    def rank_first(self, peer: PeerId) -> None:
        others = dict.fromkeys(self._records, Health.DEAD)
        self._dispatch.update(View(self._records, health=others | {peer: Health.ALIVE}))

    def reply(self, call: Call) -> None:
        """Its peer has answered by now."""
        self.open.remove(call)
        self.events.append(Replied(call, pb.ComputeReply(call=call.number, rows=b"rows"), self.now))

    def end(self, call: Call) -> None:
        self.open.remove(call)
        self.events.append(Ended(call.peer, PeerLost("gone"), (call,)))

    def assign(self, layer: int, experts: list[int], avoid: dict[int, set[PeerId]]) -> Assignment:
        return self._dispatch.assign(layer, experts, avoid)

    def news(self) -> list[Event]:
        found = list(self.events)
        self.events.clear()
        return found

    def next_event(self, timeout_s: float) -> Event | None:
        if self.answers and self.open:
            self.reply(self.open[0])
        if self.events:
            return self.events.popleft()
        assert timeout_s < math.inf, "a layer that waits for ever"
        self.now += max(timeout_s, 0.0)
        return None

    def deadline_s(self, peer: PeerId, pairs: int) -> float:
        return DEADLINE_S

    def failed(self, layer: int, peer: PeerId, error: ShoalError) -> None:
        self.errors.append((peer, error.code))

    def late(self, call: Call, now: float) -> None:
        call.is_late = True
        self.later.append(call)

    def answered(self, event: Replied) -> None:
        self.latencies_s.append(event.at - event.call.sent_at)

    def stale(self, event: Replied) -> None: ...

    def went_elsewhere(self, layer: int, peer: PeerId, error: ShoalError, *, late: bool) -> None:
        self.sent_elsewhere.append(peer)

    def connect(self, peer: PeerId, now: float) -> None: ...

    def sent(self, layer: int, peer: PeerId, pairs: int) -> None: ...

    def _send(self, peer: PeerId, pairs: int, deadline_s: float, now: float, encode: object) -> Call:
        self.calls.append(peer)
        self.tried[self.now] += 1
        if peer in self.broken:
            raise PeerLost(f"the peer {peer} is not connected")
        call = Call(next(self._numbers), peer, pairs, now, now + deadline_s)
        self.open.append(call)
        return call


def gather(desk: Desk, monkeypatch: pytest.MonkeyPatch, own: Any = None) -> torch.Tensor:
    """One row's layer that wants every expert."""
    monkeypatch.setattr(expert_gather, "time", SimpleNamespace(monotonic=lambda: desk.now))
    pairs = Pairs(torch.arange(EXPERTS)[None])
    layer = Gather(desk, ME, 0, torch.ones(1, 4), pairs, own or _nothing)
    return layer.run(desk.assign(0, pairs.experts, {}))


def _nothing(part: Part) -> torch.Tensor:
    return torch.zeros(len(part.pairs), 4)


@pytest.mark.parametrize("own_s", [2 * DEADLINE_S, 2 * WAIT_S])
def test_replies_that_came_while_this_node_computed_are_neither_late_nor_lost(
    monkeypatch: pytest.MonkeyPatch, own_s: float
) -> None:
    desk = Desk({ME: range(4), PEER: range(4, 6), OTHER: range(6, 8)})

    def own(part: Part) -> torch.Tensor:
        desk.now += DEADLINE_S / 2
        for call in list(desk.open):
            desk.reply(call)
        desk.now += own_s
        return _nothing(part)

    assert gather(desk, monkeypatch, own).shape == (1, EXPERTS, 4)
    assert len(desk.calls) == 2
    assert (desk.later, desk.sent_elsewhere, desk.errors) == ([], [], [])
    assert desk.latencies_s == pytest.approx([DEADLINE_S / 2] * 2), "how long this node computed is not the peers' time"


def test_a_call_that_broke_while_this_node_computed_goes_elsewhere_and_is_not_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk = Desk({ME: range(4), PEER: range(4, 8), OTHER: range(4, 8)})

    def own(part: Part) -> torch.Tensor:
        for call in list(desk.open):
            desk.end(call)
        desk.now += 2 * DEADLINE_S
        desk.answers = True
        return _nothing(part)

    gather(desk, monkeypatch, own)
    assert len(desk.calls) == len(desk.latencies_s) + 2, "two broke, the others were answered"
    assert desk.sent_elsewhere and not desk.later


def crowd() -> Desk:
    """Everybody holds the last expert, and nobody takes a call; as many as have their turn while a layer waits."""
    holders = [PeerId(f"peer {n}") for n in range(HOLDERS)]
    desk = Desk({ME: range(EXPERTS - 1)} | {peer: [EXPERTS - 1] for peer in holders})
    desk.broken.update(holders)
    desk.answers = True
    return desk


def test_of_many_holders_that_take_no_call_a_few_are_tried_at_a_time_until_one_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = crowd()
    with pytest.raises(RowsLost) as lost:
        gather(every, monkeypatch)
    assert isinstance(lost.value.rows[0], ExpertsUnreachable)
    assert max(every.tried.values()) == HOLDERS_TRIED_MAX
    assert set(every.calls) == every.broken, "each had its turn"
    desk = crowd()
    last = list(dict.fromkeys(every.calls))[-1]
    desk.broken.remove(last)
    gather(desk, monkeypatch)
    assert desk.calls[-1] == last


def test_a_holder_that_is_ready_meanwhile_is_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    every = crowd()
    with pytest.raises(RowsLost):
        gather(every, monkeypatch)
    desk, first = crowd(), every.calls[0]

    def assign(layer: int, experts: list[int], avoid: dict[int, set[PeerId]]) -> Assignment:
        if len(desk.calls) == HOLDERS_TRIED_MAX and first in desk.broken:
            desk.broken.remove(first)
            desk.events.append(Ready(first))
            desk.rank_first(first)
        return Desk.assign(desk, layer, experts, avoid)

    monkeypatch.setattr(desk, "assign", assign)
    gather(desk, monkeypatch)
    assert desk.calls == [*every.calls[:HOLDERS_TRIED_MAX], first]


def test_the_pauses_between_tries_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk({ME: range(EXPERTS - 1), PEER: [EXPERTS - 1]})
    desk.broken.add(PEER)
    with pytest.raises(RowsLost):
        gather(desk, monkeypatch)
    tries = sorted(desk.tried)
    pauses = [after - before for before, after in itertools.pairwise(tries)]
    assert pauses == pytest.approx(sorted(pauses))
    assert pauses[0] == pytest.approx(PAUSE_S)
    assert pauses[-2:] == pytest.approx([PAUSE_S_MAX] * 2)
