"""The owner threads: who gets which batch, and that every Future is settled whatever happens."""

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any

import pytest
import torch
from chain import Chain
from tiny import model

from protos.errors import (
    BrokenInvariant,
    Fenced,
    Gap,
    InvalidRequest,
    NonFinite,
    Overloaded,
    ShoalError,
    ShuttingDown,
    UnitMissing,
    UnknownSession,
)
from protos.ids import SessionId
from protos.sampling import SamplingParams
from shard.batch import Chunk, Step
from shard.kv import KvPool
from shard.stage import OpenSession, Stage, StepResult
from shard.worker import INBOX_MAX, ROWS_MAX, STEPS_QUEUED_MAX, Worker

WAIT_S = 60.0  # only reached by a hang


class ToyStage:
    """A stage that computes nothing.  Each batch waits for `allow`, and the rows of all batches are written down."""

    def __init__(self, rows_max: int = 1 << 14) -> None:
        self.rows_max = rows_max
        self.kv = KvPool({}, 0, torch.device("cpu"))
        self.sessions: dict[SessionId, int] = {}
        self.batches: list[dict[SessionId, int]] = []
        self.running = threading.Semaphore(0)  # a batch has begun
        self.errors: dict[SessionId, ShoalError] = {}
        self.raises: Exception | None = None
        self.poisoned: SessionId | None = None  # whose rows make a forward raise, whoever is in it
        self.undone: list[Step] = []
        self._allowed = threading.Semaphore(0)

    def allow(self, batches: int) -> None:
        """Lets so many batches run to their end."""
        self._allowed.release(batches)

    def __len__(self) -> int:
        return len(self.sessions)

    def open(self, request: OpenSession) -> None:
        self.sessions[request.session] = 0

    def close(self, session: SessionId, epoch: int) -> None:
        self.sessions.pop(session, None)

    def raise_epoch(self, session: SessionId, expected: int, epoch: int) -> None:
        if expected != 0:
            raise Fenced("it is not at that epoch")

    def undo(self, step: Step) -> None:
        self.undone.append(step)

    def truncate(self, session: SessionId, position: int) -> None:
        self.sessions[session] = position

    def begin(self, step: Step) -> None:
        if step.session not in self.sessions:
            raise UnknownSession(f"session {step.session} is not open here")

    def run(self, chunks: list[Chunk]) -> list[StepResult | ShoalError]:
        self.batches.append({chunk.step.session: chunk.rows for chunk in chunks})
        self.running.release()
        assert self._allowed.acquire(timeout=WAIT_S)
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        if self.poisoned in self.batches[-1]:
            raise UnitMissing("expert.0.2 is not held here")
        return [self.errors.get(c.step.session) or self._result(c) for c in chunks]

    @staticmethod
    def _result(chunk: Chunk) -> StepResult:
        rows = None if chunk.step.rows is None else chunk.step.rows[chunk.start - chunk.step.start :][: chunk.rows]
        return StepResult(chunk.step.session, 0, chunk.end, rows=rows, token=7 if chunk.ends_feed else None)


class Bench:
    """A worker over a toy stage."""

    def __init__(self, **options: Any) -> None:
        self.stage = ToyStage()
        self.worker = Worker(self.stage, **options)  # type: ignore[arg-type]

    def open(self, *names: str) -> None:
        for name in names:
            result(self.worker.open(request(name)))

    def feed(self, name: str, rows: int = 1) -> Future[StepResult]:
        return self.worker.step(Step(SessionId(name), 0, 0, rows, tuple(range(rows))))

    def begun(self) -> None:
        assert self.stage.running.acquire(timeout=WAIT_S)

    def end(self) -> None:
        self.stage.allow(1000)
        self.worker.shutdown()


def request(name: str, positions: int = 4096) -> OpenSession:
    return OpenSession(SessionId(name), 0, (5,), 1, SamplingParams(), positions)


def result(future: Future[Any]) -> Any:
    return future.result(WAIT_S)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.end()


def alive(name: str) -> int:
    return sum(thread.name == name for thread in threading.enumerate())


# Fairness


def test_a_long_prompt_lets_a_running_answer_into_every_batch() -> None:
    bench = Bench(rows_max=8)
    bench.open("answer", "prompt")
    prompt = bench.feed("prompt", 70)
    bench.begun()
    for _ in range(10):  # each fed while a batch runs, so each token costs this batch and its own
        token = bench.feed("answer")
        bench.stage.allow(1)
        bench.begun()
        assert not token.done()
        bench.stage.allow(1)
        result(token)
        if prompt.done():
            break
        bench.begun()
    bench.stage.allow(1)
    bench.end()
    answers = [batch for batch in bench.stage.batches if "answer" in batch]
    assert answers == [{"prompt": 7, "answer": 1}] * 4 + [{"prompt": 2, "answer": 1}]
    assert result(prompt).token == 7


def test_a_batch_takes_at_most_rows_max_of_a_prompt_and_the_feed_ends_with_its_last_chunk(bench: Bench) -> None:
    bench.open("prompt")
    bench.stage.allow(3)
    assert result(bench.feed("prompt", 2 * ROWS_MAX + 5)).position == 2 * ROWS_MAX + 5
    assert [batch["prompt"] for batch in bench.stage.batches] == [ROWS_MAX, ROWS_MAX, 5]


def test_what_waits_when_a_batch_ends_goes_into_the_next_one_together(bench: Bench) -> None:
    bench.open("a", "b", "c", "d")
    first = bench.feed("a")
    bench.begun()
    others = [bench.feed(name) for name in "bcd"]
    bench.stage.allow(2)
    wait([first, *others], WAIT_S)
    assert bench.stage.batches == [{"a": 1}, {"b": 1, "c": 1, "d": 1}]


def test_rows_that_came_in_chunks_leave_in_one_piece() -> None:
    bench = Bench(rows_max=3)
    bench.open("one")
    rows = torch.arange(8.0).view(8, 1)
    bench.stage.allow(3)
    found = result(bench.worker.step(Step(SessionId("one"), 0, 0, 8, rows=rows)))
    assert torch.equal(found.rows, rows)
    bench.end()


# Limits


def test_sessions_beyond_the_limit_hear_when_to_ask_again_and_a_close_makes_room() -> None:
    bench = Bench(sessions_max=2)
    bench.open("a", "b")
    with pytest.raises(Overloaded, match="2 sessions") as refused:
        bench.open("c")
    assert refused.value.retry_after_s
    assert bench.worker.sessions == 2
    result(bench.worker.close(SessionId("a"), 0))
    bench.open("c")
    bench.end()


def test_steps_of_one_session_run_in_order_one_a_batch(bench: Bench) -> None:
    bench.open("a")
    first = bench.feed("a", 3)
    bench.begun()
    later = [bench.feed("a", 4), bench.feed("a", 5)]
    bench.stage.allow(3)
    assert [result(future).token for future in (first, *later)] == [7, 7, 7]
    assert bench.stage.batches == [{"a": 3}, {"a": 4}, {"a": 5}]


def test_steps_beyond_a_session_s_queue_hear_when_to_ask_again(bench: Bench) -> None:
    bench.open("a")
    first = bench.feed("a")
    bench.begun()
    queued = [bench.feed("a") for _ in range(1 + STEPS_QUEUED_MAX)]  # one of them is under way once the first ended
    beyond = bench.feed("a")
    bench.stage.allow(2 + STEPS_QUEUED_MAX)
    with pytest.raises(Overloaded) as refused:
        result(beyond)
    assert refused.value.retry_after_s
    assert {result(future).token for future in (first, *queued)} == {7}


def test_requests_beyond_the_inbox_hear_when_to_ask_again_and_a_close_gets_in(bench: Bench) -> None:
    bench.open("a")
    first = bench.feed("a")
    bench.begun()
    waiting = [bench.worker.truncate(SessionId("a"), 0) for _ in range(INBOX_MAX)]
    with pytest.raises(Overloaded):
        result(bench.feed("a"))
    closed = bench.worker.close(SessionId("a"), 0)
    bench.stage.allow(2)
    result(first)
    wait([*waiting, closed], WAIT_S)
    assert closed.result(0) is None


def test_a_raised_epoch_ends_the_step_under_way_and_those_behind_it(bench: Bench) -> None:
    bench.open("a")
    prompt = bench.feed("a", 3 * ROWS_MAX)
    bench.begun()
    behind = bench.feed("a")
    raised = bench.worker.raise_epoch(SessionId("a"), 0, 1)
    bench.stage.allow(1)
    assert result(raised) is None
    for future in (prompt, behind):
        with pytest.raises(Fenced):
            result(future)
    assert len(bench.stage.batches) == 1


def test_an_epoch_that_cannot_be_raised_disturbs_nobody(bench: Bench) -> None:
    bench.open("a")
    step = bench.feed("a")
    bench.begun()
    raised = bench.worker.raise_epoch(SessionId("a"), 5, 6)
    bench.stage.allow(1)
    with pytest.raises(Fenced):
        result(raised)
    assert result(step).token == 7


# Errors


def test_a_forward_that_raises_is_a_typed_error_for_all_of_the_batch_and_the_worker_lives_on(bench: Bench) -> None:
    bench.open("a", "b")
    bench.stage.raises = ValueError("a shape is wrong")
    first = bench.feed("a")
    bench.begun()
    second = bench.feed("b")
    bench.stage.allow(2)
    with pytest.raises(BrokenInvariant, match=r"ValueError.*a shape is wrong") as failed:
        result(first)
    assert isinstance(failed.value.__cause__, ValueError)
    assert result(second).token == 7
    bench.stage.allow(1)
    assert result(bench.feed("a")).token == 7


def test_a_typed_error_of_a_forward_arrives_as_it_is(bench: Bench) -> None:
    bench.open("a")
    bench.stage.raises = UnitMissing("expert.1.5 is not held here")
    bench.stage.allow(1)
    with pytest.raises(UnitMissing, match=r"expert\.1\.5"):
        result(bench.feed("a"))


def test_who_makes_a_forward_raise_fails_alone_and_the_others_of_the_batch_go_on(bench: Bench) -> None:
    bench.open("a", "b", "c")
    first = bench.feed("a")
    bench.begun()
    bench.stage.poisoned = SessionId("b")
    b, c = bench.feed("b", 4), bench.feed("c")
    bench.stage.allow(4)
    with pytest.raises(UnitMissing, match="not held"):
        result(b)
    assert result(first).token == result(c).token == 7
    assert bench.stage.batches == [{"a": 1}, {"b": 4, "c": 1}, {"b": 4}, {"c": 1}]
    assert [step.session for step in bench.stage.undone] == ["b"]


def test_a_session_s_own_error_is_its_own(bench: Bench) -> None:
    bench.open("a", "b", "c")
    bench.stage.errors[SessionId("b")] = NonFinite("garbage")
    first = bench.feed("a")
    bench.begun()
    b, c = bench.feed("b"), bench.feed("c")
    bench.stage.allow(2)
    with pytest.raises(NonFinite):
        result(b)
    assert result(c).token == result(first).token == 7


def test_a_step_that_breaks_its_own_check_is_a_typed_error_and_the_worker_lives_on(bench: Bench) -> None:
    bench.open("a")
    broken = Step(SessionId("a"), 0, 0, 1, rows=torch.tensor(0.0))
    bench.stage.begin = lambda step: step.end  # type: ignore[assignment, return-value, method-assign]
    with pytest.raises(BrokenInvariant, match="IndexError"):
        result(bench.worker.step(broken))
    bench.stage.allow(1)
    assert result(bench.feed("a")).token == 7


def test_chunks_that_cannot_be_joined_are_a_typed_error_and_the_worker_lives_on() -> None:
    bench = Bench(rows_max=3)
    bench.open("one")
    widths = iter([1, 2, 3])
    bench.stage._result = lambda chunk: StepResult(  # type: ignore[method-assign]
        chunk.step.session, 0, chunk.end, rows=torch.zeros((chunk.rows, next(widths)))
    )
    bench.stage.allow(4)
    with pytest.raises(BrokenInvariant, match="RuntimeError"):
        result(bench.feed("one", 6))
    assert result(bench.feed("one")).rows.shape == (1, 3)
    bench.end()


def test_an_open_that_fails_says_why_and_holds_nothing(bench: Bench) -> None:
    def refuse(request: OpenSession) -> None:
        raise InvalidRequest(f"{request.session} is refused")

    bench.stage.open = refuse  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match="a is refused"):
        bench.open("a")
    assert bench.worker.sessions == 0


def test_a_step_of_a_session_that_is_not_open_is_refused(bench: Bench) -> None:
    with pytest.raises(UnknownSession):
        result(bench.feed("nobody"))


# Ends


def test_a_close_during_a_step_ends_the_step_and_the_session(bench: Bench) -> None:
    bench.open("a", "b")
    step = bench.feed("a", 10 * ROWS_MAX)
    bench.begun()
    closed = bench.worker.close(SessionId("a"), 0)
    bench.stage.allow(1)
    result(closed)
    with pytest.raises(UnknownSession, match="a was closed"):
        result(step)
    bench.stage.allow(1)
    assert result(bench.feed("b")).token == 7
    assert [list(batch) for batch in bench.stage.batches] == [["a"], ["b"]]
    assert bench.worker.sessions == 1


def test_a_rewind_during_a_step_ends_the_step_and_says_what_is_held(bench: Bench) -> None:
    bench.open("a")
    step = bench.feed("a", 10 * ROWS_MAX)
    bench.begun()
    rewound = bench.worker.truncate(SessionId("a"), 3)
    bench.stage.allow(1)
    result(rewound)
    with pytest.raises(Gap, match="rewound") as gap:
        result(step)
    assert gap.value.held == 3
    bench.stage.allow(1)
    assert result(bench.feed("a")).token == 7


def test_a_call_runs_between_two_batches_in_the_thread_that_owns_the_stage(bench: Bench) -> None:
    bench.open("a")
    step = bench.feed("a", 2 * ROWS_MAX)
    bench.begun()
    called = bench.worker.call(lambda stage: (stage, threading.current_thread().name, len(bench.stage.batches)))
    bench.stage.allow(2)
    assert result(called) == (bench.stage, "shoal-stage", 1)
    result(step)


def test_shutdown_settles_all_that_waits_and_ends_the_thread() -> None:
    threads = alive("shoal-stage")
    bench = Bench(rows_max=4, sessions_max=3)
    bench.open("a", "b", "c")
    assert alive("shoal-stage") == threads + 1
    first = bench.feed("a", 40)
    bench.begun()
    others: list[Future[Any]] = [bench.feed("b"), bench.feed("c", 9), bench.worker.close(SessionId("c"), 0)]
    ending = threading.Thread(target=bench.worker.shutdown)
    ending.start()
    while not bench.worker._stopped:
        pass
    late: list[Future[Any]] = [bench.feed("b"), bench.worker.open(request("d"))]
    bench.stage.allow(1)
    ending.join(WAIT_S)
    assert not ending.is_alive()
    assert alive("shoal-stage") == threads
    for future in (first, others[0], *late):
        with pytest.raises(ShuttingDown):
            future.result(0)
    with pytest.raises(UnknownSession):
        others[1].result(0)
    assert others[2].result(0) is None
    assert len(bench.stage.batches) == 1
    bench.worker.shutdown()


def test_shutdown_from_several_threads_at_once_returns_in_all_of_them(bench: Bench) -> None:
    with ThreadPoolExecutor(4) as pool:
        wait([pool.submit(bench.worker.shutdown) for _ in range(4)], WAIT_S)
    assert not bench.worker._thread.is_alive()


def test_cancelled_futures_stop_nothing_and_nobody(bench: Bench) -> None:
    bench.open("a", "b")
    first = bench.feed("a")
    bench.begun()
    cancelled: list[Future[Any]] = [bench.feed("b"), bench.worker.open(request("c")), first]
    assert all(future.cancel() for future in cancelled)
    bench.stage.allow(2)
    with pytest.raises(CancelledError):
        first.result(0)
    bench.open("d")
    assert set(bench.stage.sessions) == {"a", "b", "c", "d"}, "whoever cancels still has to close"
    closing = bench.worker.close(SessionId("c"), 0)
    closing.cancel()
    result(bench.worker.close(SessionId("d"), 0))
    assert set(bench.stage.sessions) == {"a", "b"}


def test_futures_that_are_cancelled_while_they_are_settled_never_stop_the_worker(bench: Bench) -> None:
    """Cancelling races with the worker's own settling; whoever wins, the other must not mind."""
    bench.open("a")
    bench.stage.allow(300)
    for _ in range(100):
        future = bench.feed("a")
        future.cancel()
        result(bench.worker.call(lambda _: None))
    assert result(bench.feed("a")).token == 7


# A real stage, many threads


@pytest.fixture(scope="module")
def tiny() -> Any:
    return model("mixtral")


def answer(worker: Worker, name: str, prompt: list[int], new: int) -> list[int]:
    """One session from its open to its close, as a door drives it."""
    session, log = SessionId(name), list(prompt)
    positions = len(prompt) + new
    result(worker.open(OpenSession(session, 0, tuple(prompt), len(prompt), SamplingParams(), positions)))
    try:
        held = 0
        for _ in range(new):
            found = result(worker.step(Step(session, 0, held, len(log), tuple(log[held:]))))
            held = len(log)
            log.append(found.token)
    finally:
        result(worker.close(session, 0))
    return log[len(prompt) :]


def test_many_threads_get_the_answers_that_each_gets_alone(tiny: Any) -> None:
    stage = Chain(tiny).stages[0]
    worker = Worker(stage, rows_max=16)
    prompts = [[(7 * n + 3 * i) % 120 + 3 for i in range(3 + 9 * n)] for n in range(8)]
    alone = [answer(worker, f"alone {n}", prompt, 10) for n, prompt in enumerate(prompts)]
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(answer, worker, f"together {n}", prompt, 10) for n, prompt in enumerate(prompts)]
        together = [job.result(WAIT_S) for job in jobs]
    worker.shutdown()
    assert together == alone
    assert (len(stage), stage.kv.bytes_used) == (0, 0)


def test_sessions_that_are_closed_by_others_in_the_middle_leave_no_kv_and_disturb_nobody(tiny: Any) -> None:
    stage: Stage = Chain(tiny).stages[0]
    worker = Worker(stage)
    expected = answer(worker, "before", list(range(5, 25)), 12)

    def closed_in_the_middle(n: int) -> bool:
        session, prompt = SessionId(f"closed {n}"), tuple(range(3, 60))
        result(worker.open(OpenSession(session, 0, prompt, len(prompt), SamplingParams(), 80)))
        step = worker.step(Step(session, 0, 0, len(prompt), prompt))
        worker.close(session, 0)
        try:
            return isinstance(result(step), StepResult)
        except UnknownSession:
            return False

    with ThreadPoolExecutor(6) as pool:
        closed = [pool.submit(closed_in_the_middle, n) for n in range(20)]
        kept = [pool.submit(answer, worker, f"kept {n}", list(range(5, 25)), 12) for n in range(4)]
        wait([*closed, *kept], WAIT_S)
    assert [job.result(0) for job in kept] == [expected] * 4
    assert all(job.exception(0) is None for job in closed)
    worker.shutdown()
    assert (len(stage), stage.kv.bytes_used) == (0, 0)


def test_no_forward_has_more_rows_than_one_expert_may_be_sent() -> None:
    stage = ToyStage(rows_max=3)
    stage.allow(1000)
    worker = Worker(stage)  # type: ignore[arg-type]
    for name in "abc":
        result(worker.open(request(name)))
    with pytest.raises(Overloaded, match="all 3 sessions"):
        result(worker.open(request("d")))
    result(worker.step(Step(SessionId("a"), 0, 0, 8, tuple(range(8)))))
    assert [batch["a"] for batch in stage.batches] == [3, 3, 2]
    worker.shutdown()
