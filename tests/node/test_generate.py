"""The door: what a client gets, whatever happens, and that nothing stays behind."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from toy_node import EOS, ToyWorker, answer, by_ids, door, text_files

from coordinator.session import DeadlinePassed
from node import generate, request
from node.generate import ClientStalled
from protos import inference_pb2 as pb
from protos.errors import (
    DeadlineExceeded,
    Gap,
    InvalidRequest,
    NonFinite,
    Overloaded,
    ShuttingDown,
)

if TYPE_CHECKING:
    from node.generate import Door


async def ask(at: Door, message: pb.GenerateRequest) -> list[pb.GenerateEvent]:
    events: list[pb.GenerateEvent] = []

    async def send(event: pb.GenerateEvent) -> None:
        await trio.lowlevel.checkpoint()
        events.append(event)

    await at.generate(request.read(message, at.manifest, at.text), send)
    return events


def run(at: Door, message: pb.GenerateRequest) -> list[pb.GenerateEvent]:
    return trio.run(ask, at, message, clock=trio.testing.MockClock(autojump_threshold=0))


def ids(events: list[pb.GenerateEvent]) -> list[int]:
    return [event.token.id for event in events if event.HasField("token")]


def text(events: list[pb.GenerateEvent]) -> str:
    return "".join(event.token.text for event in events)


def test_an_answer_is_started_then_tokens_then_finished() -> None:
    worker = ToyWorker()
    events = run(door(worker), by_ids(5, 6, max_tokens=4, logprobs=1))
    started, *tokens, finished = events
    assert started.started.prompt_tokens == 2
    assert [token.token.id for token in tokens] == answer([5, 6], 4) == [13, 27, 55, 47]
    assert [token.token.position for token in tokens] == [2, 3, 4, 5]
    assert text(tokens) == "w13 w27 w55 w47 "
    assert tokens[0].token.logprob == -0.5
    assert tokens[0].token.top[0].text == "w1 "
    assert finished.finished.reason == pb.Finished.LENGTH
    assert finished.finished.generated == 4
    assert worker.open_sessions == {}


def test_kv_for_prompt_and_max_tokens_is_reserved_before_anything_is_computed() -> None:
    worker = ToyWorker()
    run(door(worker), by_ids(5, 6, max_tokens=4))
    assert worker.opened[0].positions == 6
    assert [(step.start, step.until) for step in worker.steps] == [(0, 2), (2, 3), (3, 4), (4, 5)]


def test_an_end_token_of_the_checkpoint_ends_the_answer_unless_ignored() -> None:
    prompt = next([a, b] for a in range(60) for b in range(60) if EOS in answer([a, b], 3))
    count = answer(prompt, 3).index(EOS) + 1
    events = run(door(ToyWorker()), by_ids(*prompt, max_tokens=6))
    assert events[-1].finished.reason == pb.Finished.STOP
    assert ids(events) == answer(prompt, count)
    message = by_ids(*prompt, max_tokens=6)
    message.ignore_eos = True
    assert ids(run(door(ToyWorker()), message)) == answer(prompt, 6)


def test_a_stop_string_ends_the_text_before_it() -> None:
    worker = ToyWorker()
    message = by_ids(5, 6, max_tokens=9)
    message.stop.append("w55")
    events = run(door(worker), message)
    assert text(events) == "w13 w27 "
    assert events[-1].finished.reason == pb.Finished.STOP_STRING
    assert events[-1].finished.generated == 3
    assert worker.open_sessions == {}


def test_a_stop_string_that_the_last_token_completes_is_the_reason() -> None:
    message = by_ids(5, 6, max_tokens=3)
    message.stop.append("w55")
    assert run(door(ToyWorker()), message)[-1].finished.reason == pb.Finished.STOP_STRING


def test_text_held_back_for_a_stop_string_comes_with_the_last_token() -> None:
    message = by_ids(5, 6, max_tokens=2)
    message.stop.append("w27 and more")
    assert text(run(door(ToyWorker()), message)) == "w13 w27 "


def test_a_chat_goes_through_the_template() -> None:
    worker = ToyWorker()
    message = pb.GenerateRequest(sampling=pb.Sampling(max_tokens=1))
    message.chat.messages.add(role="user", content="w7 ")
    run(door(worker), message)
    assert worker.opened[0].log == (60, 7, 61)


def test_a_model_without_a_tokenizer_answers_with_ids_and_no_text() -> None:
    events = run(door(ToyWorker(), {}), by_ids(5, 6, max_tokens=2, logprobs=1))
    assert ids(events) == [13, 27]
    assert text(events) == ""
    message = by_ids(5, max_tokens=2)
    message.stop.append("x")
    with pytest.raises(InvalidRequest, match="no tokenizer"):
        run(door(ToyWorker(), {}), message)


def test_beyond_recompute_at_everything_is_fed_again_once() -> None:
    worker = ToyWorker()
    run(door(worker, recompute_at=3), by_ids(5, 6, max_tokens=4))
    assert [(step.start, step.until) for step in worker.steps] == [(0, 2), (2, 3), (0, 4), (4, 5)]


def test_a_gap_is_fed_again_and_the_client_sees_nothing() -> None:
    class Forgetful(ToyWorker):
        def step(self, step):
            if len(self.steps) == 2:
                self.faults.append(Gap(held=1))
            return super().step(step)

    forgetful = Forgetful()
    assert ids(run(door(forgetful), by_ids(5, 6, max_tokens=4))) == answer([5, 6], 4)
    assert [step.start for step in forgetful.steps] == [0, 2, 3, 1, 4]


def test_what_fails_before_the_start_is_raised_and_frees_everything() -> None:
    worker = ToyWorker()
    worker.open_fault = Overloaded("KV is full", retry_after_s=2.0)
    at = door(worker, sessions_max=1)
    for _ in range(2):
        with pytest.raises(Overloaded, match="KV is full"):
            run(at, by_ids(5, max_tokens=1))
    assert at.gate.running == 0


def test_what_fails_after_the_start_is_a_typed_event() -> None:
    worker = ToyWorker()
    worker.faults.append(NonFinite("row 0 is NaN"))
    started, failed = run(door(worker), by_ids(5, max_tokens=1))
    assert started.HasField("started")
    assert (failed.failed.code, failed.failed.message) == ("non_finite", "row 0 is NaN")
    assert worker.open_sessions == {}


def test_a_step_that_never_ends_fails_by_its_deadline() -> None:
    worker = ToyWorker()
    worker.stuck = True
    failed = run(door(worker, step_deadline_s=5.0), by_ids(5, max_tokens=1))[-1].failed
    assert failed.code == DeadlineExceeded.code
    assert "step_deadline_s" in failed.message
    assert worker.open_sessions == {}


def test_a_client_that_leaves_frees_its_kv_and_its_place() -> None:
    worker = ToyWorker()
    worker.stuck = True
    at = door(worker)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, at, by_ids(5, max_tokens=1))
            await trio.testing.wait_all_tasks_blocked()
            assert len(worker.open_sessions) == at.gate.running == 1
            nursery.cancel_scope.cancel()
        assert len(worker.open_sessions) == at.gate.running == 0

    trio.run(main)


def test_a_client_that_does_not_read_loses_its_answer() -> None:
    worker = ToyWorker()
    at = door(worker, client_wait_s=7.0)

    async def main() -> None:
        async def send(_: pb.GenerateEvent) -> None:
            await trio.sleep_forever()

        with pytest.raises(ClientStalled, match="client_wait_s"):
            await at.generate(request.read(by_ids(5, max_tokens=1), at.manifest, at.text), send)
        assert trio.current_time() == 7.0

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert worker.open_sessions == {}
    assert at.gate.running == 0


def test_a_node_that_leaves_tells_who_runs_and_who_waits_and_refuses_new_ones() -> None:
    worker = ToyWorker()
    worker.stuck = True
    at = door(worker, sessions_max=1)
    ends: list[object] = []

    async def client() -> None:
        try:
            ends.append((await ask(at, by_ids(5, max_tokens=1)))[-1].failed.code)
        except ShuttingDown as error:
            ends.append(error)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(client)
                await trio.testing.wait_all_tasks_blocked()
            at.leave()
        with pytest.raises(ShuttingDown):
            await ask(at, by_ids(5, max_tokens=1))

    trio.run(main)
    assert {end if isinstance(end, str) else type(end) for end in ends} == {"shutting_down", ShuttingDown}
    assert worker.open_sessions == {}
    assert at.gate.running == 0


def test_a_client_is_told_that_its_node_leaves_before_the_stages_are_free() -> None:
    worker, closed = ToyWorker(), Future[None]()
    worker.stuck = True
    worker.close = lambda *_: closed  # type: ignore[method-assign]
    at = door(worker)
    events: list[pb.GenerateEvent] = []

    async def send(event: pb.GenerateEvent) -> None:
        events.append(event)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(at.generate, request.read(by_ids(5, max_tokens=1), at.manifest, at.text), send)
            await trio.testing.wait_all_tasks_blocked()
            at.leave()
            await trio.testing.wait_all_tasks_blocked()
            assert [event.failed.code for event in events if event.HasField("failed")] == ["shutting_down"]
            assert at.gate.running == 1
            closed.set_result(None)

    trio.run(main)
    assert at.gate.running == 0
    assert sum(event.HasField("failed") for event in events) == 1


def test_a_hundred_answers_at_once_leave_nothing_behind() -> None:
    worker = ToyWorker()
    at = door(worker, sessions_max=8, queue_max=100)
    got: dict[int, list[int]] = {}

    async def client(n: int) -> None:
        got[n] = ids(await ask(at, by_ids(n % 60, max_tokens=5)))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for n in range(100):
                nursery.start_soon(client, n)

    trio.run(main)
    expected = {n: answer([n % 60], 5) for n in range(100)}
    assert {n: tokens for n, tokens in got.items() if EOS not in expected[n]} == {
        n: tokens for n, tokens in expected.items() if EOS not in tokens
    }
    assert worker.open_sessions == {}
    assert at.gate.running == 0


def test_defaults_come_from_the_checkpoint_and_the_request_wins() -> None:
    files = text_files({"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.1})
    worker = ToyWorker()
    run(door(worker, files), by_ids(5, max_tokens=1, top_k=3))
    params = worker.opened[0].params
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.7, 3, 1.1)
    assert params.stop_tokens == (EOS,)


def test_an_answer_remembers_so_many_notices_for_its_client_and_no_more_are_sent() -> None:
    async def main(*, started: bool) -> int:
        sent: list[pb.GenerateEvent] = []

        async def send(event: pb.GenerateEvent) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(event)

        at = door(ToyWorker())
        running = generate._Answer(at, request.read(by_ids(5), at.manifest, at.text), send)
        running._started = started
        for number in range(generate.NOTICES_MAX + 1):
            for late in (False, True):
                await running._notice("peer_lost", f"peer {number} is gone", None, late=late)
        return len(sent) + len(running._notices)

    for started in (False, True):
        assert trio.run(partial(main, started=started)) == 2 * generate.NOTICES_MAX, "late ones take no failure's place"


def test_what_an_answer_is_told_and_does_not_look_at_has_a_limit() -> None:
    async def main() -> int:
        at = door(ToyWorker())
        running = generate._Answer(at, request.read(by_ids(5), at.manifest, at.text), sleep)
        for _ in range(generate.INBOX_MAX + 1):
            running._inbox.put(DeadlinePassed(frozenset()))
        await trio.testing.wait_all_tasks_blocked()
        return len(running._inbox)

    async def sleep(_: pb.GenerateEvent) -> None:
        await trio.sleep_forever()

    assert trio.run(main) == generate.INBOX_MAX
