"""Answers through stages on two and three hosts, over real gRPC: exact, also when one of them dies."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from toy_swarm import LAYERS, Node, Swarm, ask, eventually, expected, ids, notices, record

from coordinator import route
from node.passage import PIECE_ROWS
from protos.errors import ExpertsUnreachable, PeerLost, ShoalError
from protos.ids import PeerId

if TYPE_CHECKING:
    from shard.batch import Step
    from shard.stage import StepResult

PROMPT = [5, 17, 99, 3, 42]
LONG = [(7 * n + n // 5) % 128 for n in range(PIECE_ROWS + 90)]


def run(node: Node, prompt: list[int], count: int, **options: object) -> list:
    return trio.run(partial(ask, node.door, prompt, count, **options))


@pytest.mark.parametrize("door", [0, 1, 2])
def test_two_spans_answer_exactly_whichever_node_is_the_door(door: int) -> None:
    with Swarm() as swarm:
        nodes = [swarm.node(range(2)), swarm.node(range(2, LAYERS)), swarm.node()]
        assert ids(run(nodes[door], PROMPT, 12)) == expected(PROMPT, 12)
        eventually(lambda: sum(node.sessions for node in nodes) == 0)


def test_three_spans_answer_a_long_prompt_in_pieces() -> None:
    with Swarm() as swarm:
        nodes = [swarm.node(range(1)), swarm.node(range(1, 3)), swarm.node(range(3, LAYERS)), swarm.node()]
        for node in nodes:
            assert ids(run(node, LONG, 4)) == expected(LONG, 4)
        eventually(lambda: sum(node.sessions for node in nodes) == 0)


def test_logprobs_cross_the_wire() -> None:
    with Swarm() as swarm:
        whole = swarm.node(range(LAYERS), known=False)
        swarm.records[whole.peer] = record(whole, range(LAYERS))
        here = run(whole, PROMPT, 3, logprobs=2, prompt_logprobs=True)
        del swarm.records[whole.peer]
        swarm.node(range(2))
        swarm.node(range(2, LAYERS))
        there = run(swarm.node(), PROMPT, 3, logprobs=2, prompt_logprobs=True)
    assert list(there[0].started.prompt_logprobs) == pytest.approx(list(here[0].started.prompt_logprobs), abs=1e-5)
    assert len(there[0].started.prompt_logprobs) == len(PROMPT) - 1
    for a, b in zip(there[1:-1], here[1:-1], strict=True):
        assert a.token.id == b.token.id
        assert a.token.logprob == pytest.approx(b.token.logprob, abs=1e-5)
        assert [top.id for top in a.token.top] == [top.id for top in b.token.top]


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stage_that_dies_in_decoding_is_replaced_and_the_answer_goes_on_exactly(victim: int) -> None:
    spans = [range(1), range(1, 3), range(3, LAYERS)]
    with Swarm() as swarm:
        nodes = [swarm.node(span) for span in spans]
        door = swarm.node()
        spare = swarm.node(spans[victim], known=False)

        def on_token(count: int) -> None:
            if count == 4:
                swarm.records[spare.peer] = record(spare, spans[victim])
                nodes[victim].kill()

        events = run(door, PROMPT, 12, on_token=on_token)
        assert ids(events) == expected(PROMPT, 12)
        (notice,) = notices(events)
        assert notice.peer_id == nodes[victim].peer
        assert nodes[victim].peer[:8] in notice.message
        assert nodes[victim].address in notice.message
        assert events[-1].HasField("finished")
        living = [node for node in (*nodes, spare) if node is not nodes[victim]]
        eventually(lambda: sum(node.sessions for node in living) == 0)


def test_a_stage_that_is_gone_before_the_prefill_is_replaced() -> None:
    with Swarm() as swarm:
        swarm.node(range(2))
        dead = swarm.node(range(2, LAYERS))
        door = swarm.node()
        dead.kill()
        spare = swarm.node(range(2, LAYERS), known=False)
        swarm.records[spare.peer] = record(spare, range(2, LAYERS))
        events = run(door, PROMPT, 5)
        assert ids(events) == expected(PROMPT, 5)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_stage_that_dies_in_the_prefill_is_replaced(victim: int) -> None:
    spans = [range(1), range(1, 3), range(3, LAYERS)]
    with Swarm() as swarm:
        nodes = [swarm.node(span) for span in spans]
        door = swarm.node()
        spare = swarm.node(spans[victim], known=False)
        step = nodes[victim].worker.step

        def dying(made: Step) -> Future[StepResult]:
            if made.start == PIECE_ROWS:
                swarm.records[spare.peer] = record(spare, spans[victim])
                nodes[victim].kill()
            return step(made)

        nodes[victim].worker.step = dying  # type: ignore[method-assign]
        events = run(door, LONG, 3)
        assert ids(events) == expected(LONG, 3)
        assert [notice.peer_id for notice in notices(events)] == [nodes[victim].peer]


def test_without_another_holder_the_error_names_the_peer_after_the_repair_wait() -> None:
    with Swarm() as swarm:
        swarm.node(range(2))
        lost = swarm.node(range(2, LAYERS))
        door = swarm.node(repair_wait_s=0.5)

        def on_token(count: int) -> None:
            if count == 3:
                lost.kill()

        events = run(door, PROMPT, 12, on_token=on_token)
        failed = events[-1].failed
        assert 3 <= len(ids(events)) <= 4  # one was on its way
        assert ids(events) == expected(PROMPT, 12)[: len(ids(events))]
        assert failed.code == PeerLost.code
        assert lost.peer[:8] in failed.message
        assert lost.address in failed.message


def test_a_holder_that_comes_in_time_takes_over() -> None:
    with Swarm() as swarm:
        swarm.node(range(2))
        lost = swarm.node(range(2, LAYERS))
        door = swarm.node(repair_wait_s=20.0)
        spare = swarm.node(range(2, LAYERS), known=False)

        def on_token(count: int) -> None:
            if count == 3:
                lost.kill()

        planned = door.door.plan
        plans: list[int] = []

        def plan(avoid: frozenset[PeerId]) -> object:
            plans.append(len(avoid))
            if len(plans) == 4:
                swarm.records[spare.peer] = record(spare, range(2, LAYERS))
            return planned(avoid)

        door.door.plan = plan  # type: ignore[method-assign, assignment]
        assert ids(run(door, PROMPT, 10, on_token=on_token)) == expected(PROMPT, 10)
        assert len(plans) >= 4


def test_sixteen_sessions_through_two_doors_in_both_directions_never_deadlock() -> None:
    with Swarm() as swarm:
        nodes = [swarm.node(range(2)), swarm.node(range(2, LAYERS))]
        prompts = [[n + 3, 2 * n + 1, 50 - n] for n in range(16)]
        got: dict[int, list[int]] = {}

        async def client(n: int) -> None:
            got[n] = ids(await ask(nodes[n % 2].door, prompts[n], 8))

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for n in range(16):
                    nursery.start_soon(client, n)

        trio.run(main)
        assert got == {n: expected(prompts[n], 8) for n in range(16)}
        eventually(lambda: sum(node.sessions for node in nodes) == 0)


def test_a_client_that_leaves_frees_all_stages() -> None:
    with Swarm() as swarm:
        nodes = [swarm.node(range(2)), swarm.node(range(2, LAYERS))]
        door = swarm.node()

        async def main() -> None:
            with trio.CancelScope() as scope:
                await ask(door.door, PROMPT, 400, on_token=lambda count: scope.cancel() if count == 3 else None)

        trio.run(main)
        eventually(lambda: sum(node.sessions for node in nodes) == 0)
        assert not any(len(node.host) for node in nodes)


def test_a_node_without_trunk_or_peers_says_what_is_missing() -> None:
    with Swarm() as swarm:
        door = swarm.node(repair_wait_s=0.2)
        with pytest.raises(ShoalError, match="no live peer holds"):
            run(door, PROMPT, 3)


def test_what_a_stage_notices_reaches_the_client() -> None:
    with Swarm() as swarm:
        swarm.node(range(2))
        last = swarm.node(range(2, LAYERS))
        door = swarm.node()
        step = last.worker.step

        def noticing(made: Step) -> Future[StepResult]:
            if made.start == len(PROMPT) + 1:
                last.host.notice("peer_lost", "a holder of expert 3 is gone; its rows went elsewhere", PeerId("gone"))
            return step(made)

        last.worker.step = noticing  # type: ignore[method-assign]
        events = run(door, PROMPT, 5)
        assert ids(events) == expected(PROMPT, 5)
        (notice,) = notices(events)
        assert (notice.code, notice.peer_id) == ("peer_lost", "gone")
        assert "expert 3" in notice.message


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_feed_whose_experts_nobody_answers_in_the_middle_is_fed_again(victim: int) -> None:
    with Swarm() as swarm:
        nodes = [swarm.node(span) for span in (range(1), range(1, 3), range(3, LAYERS))]
        door = swarm.node()
        step = nodes[victim].worker.step
        failed: list[int] = []

        def failing(made: Step) -> Future[StepResult]:
            if made.start == PIECE_ROWS and not failed:
                failed.append(made.start)
                future: Future[StepResult] = Future()
                future.set_exception(ExpertsUnreachable("nobody answers for expert 3"))
                return future
            return step(made)

        nodes[victim].worker.step = failing  # type: ignore[method-assign]
        events = run(door, [*LONG, *LONG[:100]], 3)
        assert failed == [PIECE_ROWS]
        assert ids(events) == expected([*LONG, *LONG[:100]], 3)
        assert [notice.code for notice in notices(events)] == ["experts_unreachable"]


def test_a_stage_whose_own_bug_breaks_a_step_is_not_asked_by_the_next_answers() -> None:
    with Swarm() as swarm:
        swarm.node(range(2))
        broken = swarm.node(range(2, LAYERS))
        door = swarm.node()
        spare = swarm.node(range(2, LAYERS), known=False)
        failed: list[int] = []

        def failing(made: Step) -> Future[StepResult]:
            swarm.records[spare.peer] = record(spare, range(2, LAYERS))
            failed.append(made.start)
            future: Future[StepResult] = Future()
            future.set_exception(ZeroDivisionError("a bug of this stage"))
            return future

        broken.worker.step = failing  # type: ignore[method-assign]
        events = run(door, PROMPT, 3)
        assert ids(events) == expected(PROMPT, 3)
        assert [(notice.code, notice.peer_id) for notice in notices(events)] == [("remote_error", broken.peer)]
        for _ in range(6):
            assert not notices(run(door, PROMPT, 2))
        assert failed == [0]
        assert "a bug of this stage" in door.known.health.score(broken.peer).last_error


def test_a_node_that_computes_for_other_doors_is_as_busy_as_that() -> None:
    with Swarm() as swarm:
        busy, other = swarm.node(range(LAYERS)), swarm.node()
        idle = swarm.node(range(LAYERS), known=False)
        busy.worker.step = lambda made: Future()  # type: ignore[method-assign]
        count = route.HOME_QUEUE_MAX + 1

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(ask, other.door, PROMPT, 3)
                await trio.to_thread.run_sync(eventually, lambda: len(busy.host) == count)
                swarm.records[idle.peer] = record(idle, range(LAYERS))
                assert (busy.door.queue, other.door.queue, idle.door.queue) == (count, count, 0)
                for _ in range(8):
                    found, _ = busy.door.plan(frozenset())
                    assert found.stages[0].peer == idle.peer
                nursery.cancel_scope.cancel()

        trio.run(main)


def test_when_all_is_stopped_no_thread_stays() -> None:
    before = set(threading.enumerate())  # another test's may still be ending
    with Swarm() as swarm:
        for node in (swarm.node(range(2)), swarm.node(range(2, LAYERS)), swarm.node()):
            run(node, PROMPT, 3)
    eventually(lambda: not [t.name for t in set(threading.enumerate()) - before if t.name.startswith("shoal")])
