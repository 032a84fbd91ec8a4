"""PROTOCOL.md section 10 from the caller's side, over real gRPC: whoever holds what, and whatever a peer does, the
numbers are those of one bank that holds everything."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

import pytest
import torch
from toy_experts import ME, WAIT_S, Shoal, Tiny

from coordinator.view import Health
from node.expert_port import LATE_DEADLINES_MAX
from node.expert_streams import QUEUE_MAX, Call, Replied
from protos import expert_pb2 as pb
from protos import frame
from protos.errors import ExpertsUnreachable, PeerLost, ShoalError, ShuttingDown, Unavailable
from protos.ids import PeerId
from shard.experts import RowsLost

if TYPE_CHECKING:
    from collections.abc import Callable

    from shard.experts import Part

ALL = range(8)
EVEN, ODD = range(0, 8, 2), range(1, 8, 2)
LOW, HIGH = range(4), range(4, 8)
PEER, OTHER = PeerId("b"), PeerId("c")


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return Tiny("mixtral")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe", "deepseek_v3", "granitemoe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_spread_over_nodes_give_the_bits_that_one_bank_gives(family: str, dtype: str) -> None:
    with Shoal(Tiny(family, dtype), LOW, {"b": [4, 5], "c": [6, 7]}) as shoal:
        for rows in (1, 2, 7, 40):
            shoal.check(rows, seed=rows)
        assert shoal.calls("b") and shoal.calls("c") and shoal.calls("me")


def test_a_node_that_holds_no_expert_asks_for_all_of_them(tiny: Tiny) -> None:
    with Shoal(tiny, [], {"b": LOW, "c": HIGH}) as shoal:
        for seed in range(8):
            shoal.check(1 + seed % 2, seed)
        assert not shoal.calls("me")


def test_a_node_that_holds_everything_asks_nobody(tiny: Tiny) -> None:
    with Shoal(tiny, ALL, {"b": ALL}) as shoal:
        shoal.check(5)
        assert not shoal.holder("b").calls
        (work,) = shoal.port.work()
        assert (work.peer_id, work.calls, work.pairs, work.steps) == (ME, 1, 15, 1)


def test_each_row_is_sent_once_and_all_pairs_of_a_peer_in_one_call(tiny: Tiny) -> None:
    with Shoal(tiny, [], {"b": ALL}) as shoal:
        shoal.check(6)
        (call,) = shoal.holder("b").calls
        assert len(call.pair_rows) == 18
        assert frame.decode(call.rows, bytes_max=1 << 20).shape == (6, tiny.hidden)


def test_frames_above_the_limit_are_split_by_experts_either_way(tiny: Tiny) -> None:
    limit = 48 + 4 * tiny.hidden * 10  # ten rows
    with Shoal(tiny, [], {"b": ALL}, frame_bytes_max=limit) as shoal:
        shoal.check(10)
        calls = shoal.holder("b").calls
        assert len(calls) >= 3
        assert all(len(call.pair_rows) <= 10 and len(call.rows) <= limit for call in calls)
        named = [name for call in calls for name in call.unit_hashes]
        assert len(set(named)) == len(named), "all rows of an expert are in one call"


def test_a_peer_that_dies_in_the_middle_of_a_call_is_replaced_in_the_same_layer(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {"b": HIGH, "c": HIGH}) as shoal:
        victim = in_use(shoal)
        holder = shoal.holder(victim)
        holder.gate.clear()
        drain(holder.begun)
        killer = threading.Thread(target=lambda: (holder.begun.acquire(timeout=WAIT_S), holder.stop()))
        killer.start()
        while killer.is_alive():
            shoal.check(2, seed=1)
        killer.join()
        assert shoal.retried(victim) == 1
        (notice,) = shoal.notices
        assert notice.peer_id == victim
        assert not notice.late
        calls = shoal.calls(victim)
        for seed in range(20):
            shoal.check(2, seed)
        assert shoal.calls(victim) == calls, "a dead peer is not asked again"


def in_use(shoal: Shoal) -> str:
    """A peer to which calls go now."""
    for seed in range(10):
        shoal.check(2, seed)
    return max(shoal.holders, key=shoal.calls)


def drain(semaphore: threading.Semaphore) -> None:
    while semaphore.acquire(blocking=False):
        pass


def test_a_peer_that_comes_back_is_used_again(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {"b": HIGH}) as shoal:
        shoal.check(2)
        holder = shoal.holder("b")
        holder.stop()
        again = threading.Timer(0.3, holder.start)
        again.start()
        shoal.check(2, seed=1)  # waits, since nobody else holds them
        again.join()
        shoal.check(2, seed=2)


def test_a_peer_that_never_answers_is_passed_by_and_not_asked_again_until_it_does(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {"b": HIGH, "c": HIGH}) as shoal:
        victim = in_use(shoal)
        holder = shoal.holder(victim)
        holder.gate.clear()
        while not shoal.retried(victim):
            shoal.check(2, seed=1)
        asked = shoal.calls(victim)
        for seed in range(20):
            shoal.check(2, seed)
        assert shoal.calls(victim) == asked, "one unanswered call is all that it gets"
        assert [(notice.peer_id, notice.late) for notice in shoal.notices] == [(victim, True)]
        holder.gate.set()  # its late answer is of an earlier layer: nothing is mixed up
        deadline = time.monotonic() + WAIT_S
        while shoal.calls(victim) == asked:
            assert time.monotonic() < deadline
            shoal.check(2, seed=3)


def test_a_peer_that_was_late_and_then_fails_is_told_of_as_both(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {"b": HIGH}) as shoal:
        slow, broke = Unavailable("not yet"), PeerLost("the connection broke")
        for error, late in ((slow, True), (slow, True), (broke, False), (broke, False), (slow, True)):
            shoal.port.went_elsewhere(0, PeerId("b"), error, late=late)
        assert [(notice.code, notice.late) for notice in shoal.notices] == [("unavailable", True), ("peer_lost", False)]
        assert "asked of other holders" in shoal.notices[1].message


def test_a_late_reply_counts_as_a_slow_one_and_not_for_all_the_time_that_its_peer_was_frozen(tiny: Tiny) -> None:
    with Shoal(tiny, range(4), {"b": range(4, 8)}) as shoal:
        call = Call(1, PeerId("b"), 1, sent_at=100.0, deadline=100.5, is_late=True)
        shoal.port.answered(Replied(call, pb.ComputeReply(), at=100.5 + 3600))
        assert shoal.health.score(PeerId("b")).latency_s == LATE_DEADLINES_MAX * 0.5


def test_where_nobody_else_holds_them_a_slow_peer_is_waited_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with Shoal(tiny, LOW, {"b": HIGH}) as shoal:
        shoal.check(2)
        monkeypatch.setattr(shoal.health, "deadline_s", lambda *_: 0.01)
        holder = shoal.holder("b")
        holder.gate.clear()
        threading.Timer(0.3, holder.gate.set).start()
        shoal.check(2, seed=1)
        assert len(holder.calls) == 2
        assert not shoal.retried("b"), "it went nowhere else"


def test_peers_that_answer_while_this_node_computes_for_longer_are_not_late(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Shoal(tiny, LOW, {"b": [4, 5], "c": [6, 7]}) as shoal:
        shoal.check(8)
        rows, inbox = shoal.bank.rows, shoal.port.streams._inbox

        def slowly(layer: int, hidden: torch.Tensor, part: Part) -> torch.Tensor:
            give_up, moment = time.monotonic() + WAIT_S, threading.Event()
            while inbox.qsize() < 2 and time.monotonic() < give_up:
                moment.wait(0.005)
            return rows(layer, hidden, part)

        monkeypatch.setattr(shoal.bank, "rows", slowly)
        monkeypatch.setattr(shoal.health, "deadline_s", lambda *_: 0.0)
        shoal.check(8)
        assert not shoal.notices
        assert [shoal.health.score(peer).calls_late for peer in (PEER, OTHER)] == [0, 0]
        assert [shoal.calls(name) for name in ("b", "c")] == [2, 2]


def with_rows(data: bytes) -> Callable[[pb.ComputeReply], pb.ComputeReply]:
    return lambda reply: pb.ComputeReply(call=reply.call, rows=data)


def reshaped(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[pb.ComputeReply], pb.ComputeReply]:
    def spoil(reply: pb.ComputeReply) -> pb.ComputeReply:
        found = frame.decode(reply.rows, bytes_max=1 << 24)
        rows = change(torch.frombuffer(bytearray(found.data), dtype=torch.float32).view(found.shape)).contiguous()
        name = str(rows.dtype).removeprefix("torch.")
        data = rows.view(torch.uint8).numpy().data
        return pb.ComputeReply(call=reply.call, rows=frame.encode(name, tuple(rows.shape), data))

    return spoil


SPOILS = {
    "no frame": with_rows(b"nothing"),
    "nothing at all": lambda reply: pb.ComputeReply(call=reply.call),
    "too few rows": reshaped(lambda rows: rows[:-1]),
    "too narrow": reshaped(lambda rows: rows[:, :-1]),
    "another dtype": reshaped(lambda rows: rows.to(torch.bfloat16)),
    "nan": reshaped(lambda rows: rows * math.nan),
    "one infinity": reshaped(lambda rows: torch.cat([rows[:-1], rows[-1:] + math.inf])),
    "wrong call": lambda reply: pb.ComputeReply(call=reply.call + 1_000_000, rows=reply.rows),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS.keys())
def test_a_reply_that_is_none_scores_its_peer_and_the_call_goes_elsewhere(
    tiny: Tiny, spoil: Callable[[pb.ComputeReply], pb.ComputeReply]
) -> None:
    with Shoal(tiny, LOW, {"b": HIGH, "c": HIGH}) as shoal:
        victim = in_use(shoal)
        shoal.holder(victim).spoil = spoil
        while not shoal.retried(victim):
            shoal.check(2, seed=1)
        assert shoal.health.state(PeerId(victim), time.monotonic()) is Health.DEAD
        assert shoal.health.score(PeerId(victim)).calls_failed == 1
        calls = shoal.calls(victim)
        for seed in range(5):
            shoal.check(2, seed)
        assert shoal.calls(victim) == calls
        assert [notice.peer_id for notice in shoal.notices] == [victim]


def test_rows_that_were_not_finite_before_they_left_are_not_held_against_the_peer(tiny: Tiny) -> None:
    with Shoal(tiny, [], {"b": ALL}) as shoal, torch.inference_mode():
        hidden, index = tiny.rows(2)
        hidden[0, 0] = math.nan
        out = shoal.port(tiny.layer, hidden, index)
        assert not torch.isfinite(out[0]).any()
        assert torch.isfinite(out[1]).all()
        assert shoal.health.score(PEER).calls_failed == 0


def test_rows_whose_experts_nobody_answers_are_lost_and_only_those(tiny: Tiny) -> None:
    with Shoal(tiny, [0, 1, 2], {"b": [3, 4, 5, 6, 7]}, expert_wait_s=0.4) as shoal, torch.inference_mode():
        shoal.check(2)
        shoal.holder("b").stop()
        hidden, _ = tiny.rows(3)
        with pytest.raises(RowsLost) as lost:
            shoal.port(tiny.layer, hidden, torch.tensor([[0, 1], [2, 7], [1, 2]]))
        assert list(lost.value.rows) == [1]
        assert isinstance(lost.value.rows[1], ExpertsUnreachable)
        assert "expert 7" in str(lost.value.rows[1])
        shoal.holder("b").start()


def test_experts_that_no_record_names_are_lost_after_the_wait(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {}, expert_wait_s=0.2) as shoal, torch.inference_mode():
        hidden, _ = tiny.rows(1)
        with pytest.raises(RowsLost):
            shoal.port(tiny.layer, hidden, torch.tensor([[0, 4]]))


def test_an_expert_that_somebody_new_holds_is_found_while_a_layer_waits(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {"b": HIGH}) as shoal:
        record = shoal.records.pop(PEER)
        threading.Timer(0.2, lambda: shoal.records.update({PEER: record})).start()
        shoal.check(3)


def test_a_peer_that_says_it_holds_what_it_does_not_is_passed_by(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {"b": HIGH, "c": HIGH}) as shoal:
        shoal.holder("b").service._bank._held.clear()
        shoal.holder("c").service._bank._held.update(tiny.bank(ALL)._held)
        for seed in range(10):
            shoal.check(3, seed)
        assert shoal.calls("c")


def test_a_peer_that_is_not_needed_for_a_while_is_left_without_blame_and_used_again(tiny: Tiny) -> None:
    with Shoal(tiny, LOW, {"b": HIGH, "c": HIGH}) as shoal:
        shoal.check(8)
        record = shoal.records.pop(PEER)
        until(lambda: PEER not in shoal.port.streams.peers(), lambda: shoal.check(2))
        assert shoal.health.score(PEER).calls_failed == 0
        assert shoal.health.state(PEER, time.monotonic()) is Health.ALIVE
        shoal.records[PEER] = record
        calls = shoal.calls("b")
        until(lambda: shoal.calls("b") > calls, lambda: shoal.check(8))
        assert not shoal.notices


def until(holds: Callable[[], bool], do: Callable[[], None]) -> None:
    give_up = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < give_up, "it never came to hold"
        do()


def test_a_layer_that_waits_ends_when_the_node_leaves(tiny: Tiny) -> None:
    with Shoal(tiny, [], {"b": ALL}) as shoal, torch.inference_mode():
        shoal.check(1)
        holder = shoal.holder("b")
        holder.gate.clear()
        drain(holder.begun)
        closer = threading.Thread(target=lambda: (holder.begun.acquire(timeout=WAIT_S), shoal.port.close()))
        closer.start()
        with pytest.raises(ShuttingDown):
            shoal.port(tiny.layer, *tiny.rows(1))
        holder.gate.set()
        closer.join(WAIT_S)


def test_a_peer_gets_no_more_calls_than_its_queue_has_room_for(tiny: Tiny) -> None:
    with Shoal(tiny, [], {"b": ALL}) as shoal:
        shoal.check(1)
        holder = shoal.holder("b")
        holder.gate.clear()
        streams, now = shoal.port.streams, time.monotonic()
        part = pb.ComputeRequest(call=1)
        for _ in range(QUEUE_MAX):
            streams.send(PEER, 1, WAIT_S, now, lambda number: lambda: part)
        with pytest.raises(ShoalError, match=f"{QUEUE_MAX} calls"):
            streams.send(PEER, 1, WAIT_S, now, lambda number: lambda: part)


def test_no_thread_is_left_when_the_port_is_closed(tiny: Tiny) -> None:
    def streams() -> int:
        return sum(thread.name.startswith("shoal-duplex") for thread in threading.enumerate())

    before = streams()
    with Shoal(tiny, LOW, {"b": HIGH, "c": HIGH}) as shoal:
        shoal.check(4)
        assert streams() == before + 2
    assert streams() == before
