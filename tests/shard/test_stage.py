"""A stage's laws: what a step may carry, and that a step happens to a session in full or not at all."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from chain import CPU, Chain
from tiny import model

from protos.errors import (
    BrokenInvariant,
    ContextTooLong,
    ExpertsUnreachable,
    Fenced,
    Gap,
    InvalidRequest,
    NonFinite,
    Overloaded,
    ShoalError,
    UnknownSession,
)
from protos.ids import SessionId
from protos.limits import FRAME_BYTES_MAX, FRAME_HEADER_BYTES_MAX
from protos.sampling import SamplingParams
from shard import sampler
from shard.anatomy import Anatomy
from shard.batch import Chunk, Step
from shard.body import Body
from shard.experts import ExpertBank, RowsLost
from shard.stage import OpenSession, Stage, StepResult
from shard.worker import Worker

VOCAB, HIDDEN, CONTEXT = 128, 32, 512
ONE, TWO = SessionId("one"), SessionId("two")
PROMPTS = {ONE: tuple(range(5, 14)), TWO: tuple(range(90, 73, -1))}


class FaultyExperts:
    """The port to a bank, and what can go wrong behind it: `raises` once, or NaN from one expert of layer 1."""

    def __init__(self, inner: ExpertBank) -> None:
        self.inner = inner
        self.raises: Exception | None = None
        self.garbage: set[int] = set()
        self.lost: set[int] = set()  # experts that nobody computes
        self.chosen: list[list[int]] = []

    def __call__(self, layer: int, hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        if layer != 1:
            return self.inner(layer, hidden, index)
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        self.chosen = index.tolist()
        if gone := [row for row, chosen in enumerate(self.chosen) if self.lost & set(chosen)]:
            raise RowsLost({row: ExpertsUnreachable(f"nobody has row {row}'s expert") for row in gone})
        out = self.inner(layer, hidden, index)
        bad = torch.tensor([[expert in self.garbage for expert in row] for row in self.chosen])
        return out.masked_fill(bad.unsqueeze(-1), math.nan)


@pytest.fixture(scope="module")
def tiny() -> Any:
    return model("mixtral")


def make_stage(tiny: Any, span: range | None = None, kv_bytes_max: int = 1 << 24) -> tuple[Stage, FaultyExperts]:
    anatomy = Anatomy(tiny)
    weights, bank = anatomy.tensors(), ExpertBank()
    for layer, (_, module) in anatomy.experts.items():
        bank.add_layer(layer, module)
        for expert in range(anatomy.expert_count(layer)):
            bank.add(layer, expert, weights[f"expert.{layer}.{expert}"])  # type: ignore[index]
    port = FaultyExperts(bank)
    body = Body(tiny.config, torch.float32, span or range(anatomy.layers), weights.__getitem__, port, CPU)
    return Stage(body, kv_bytes_max), port


@pytest.fixture
def stage(tiny: Any) -> Stage:
    return make_stage(tiny)[0]


@pytest.fixture
def faulty(tiny: Any) -> tuple[Stage, FaultyExperts]:
    return make_stage(tiny)


def open_request(session: SessionId = ONE, **changes: Any) -> OpenSession:
    prompt = PROMPTS[session]
    fields: dict[str, Any] = {
        "session": session,
        "epoch": 3,
        "log": prompt,
        "prompt_len": len(prompt),
        "params": SamplingParams(),
        "positions": len(prompt) + 20,
    }
    return OpenSession(**(fields | changes))


def opened(stage: Stage, *sessions: SessionId, **changes: Any) -> Stage:
    for session in sessions:
        stage.open(open_request(session, **changes))
    return stage


def step(start: int, tokens: tuple[int, ...], session: SessionId = ONE, epoch: int = 3, **more: Any) -> Step:
    return Step(session, epoch, start, **({"until": start + len(tokens), "tokens": tokens} | more))


def run(stage: Stage, *steps: Step) -> list[StepResult | ShoalError]:
    for one in steps:
        stage.begin(one)
    return stage.run([Chunk(one, one.start, one.end) for one in steps])


def token_of(result: StepResult | ShoalError) -> int:
    assert isinstance(result, StepResult), result
    assert result.token is not None
    return result.token


def prefill(stage: Stage, *sessions: SessionId) -> list[int]:
    return [token_of(result) for result in run(stage, *(step(0, PROMPTS[name], name) for name in sessions))]


def answer(stage: Stage, session: SessionId, count: int) -> list[int]:
    """The next `count` tokens of a session, from where its stage is."""
    log = list(PROMPTS[session])
    tokens: list[int] = []
    for _ in range(count):
        held = stage.held(session)
        (result,) = run(stage, step(held, tuple(log[held:]), session))
        tokens.append(token_of(result))
        log.append(tokens[-1])
    return tokens


def state(stage: Stage, session: SessionId) -> tuple[int, list[int], list[float], list[torch.Tensor]]:
    """All that a step could have changed of a session."""
    found = stage._sessions[session]
    rows = [t for layer in found.kv.keys for t in found.kv.export(layer, 0, found.kv.held)]
    return found.kv.held, list(found.log), list(found.prompt_logprobs), rows


def assert_as_before(stage: Stage, session: SessionId, before: tuple[Any, ...]) -> None:
    now = state(stage, session)
    assert now[:3] == before[:3]
    assert all(torch.equal(a, b) for a, b in zip(now[3], before[3], strict=True))


# What opens


def test_a_session_opens_once(stage: Stage) -> None:
    opened(stage, ONE)
    with pytest.raises(InvalidRequest, match="open already"):
        stage.open(open_request())
    assert len(stage) == 1


def test_more_positions_than_the_context_are_refused(stage: Stage) -> None:
    with pytest.raises(ContextTooLong, match=str(CONTEXT)):
        stage.open(open_request(positions=CONTEXT + 1))
    assert (len(stage), stage.kv.bytes_used) == (0, 0)
    stage.open(open_request(positions=CONTEXT))


@pytest.mark.parametrize(
    "changes",
    [
        {"log": (), "prompt_len": 0},
        {"prompt_len": 0},
        {"prompt_len": 10},
        {"positions": 8},
        {"log": (5, VOCAB), "prompt_len": 2},
        {"log": (5, -1), "prompt_len": 2},
    ],
    ids=["no log", "no prompt", "prompt beyond the log", "log beyond the positions", "token too high", "token below 0"],
)
def test_a_request_that_makes_no_sense_holds_nothing(stage: Stage, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        stage.open(open_request(**changes))
    assert (len(stage), stage.kv.bytes_used) == (0, 0)


def test_a_session_that_finds_the_kv_full_is_not_open_and_a_close_makes_room(tiny: Any) -> None:
    per_position = make_stage(tiny)[0].kv.bytes_per_position
    stage, _ = make_stage(tiny, kv_bytes_max=40 * per_position + 1)
    worker = Worker(stage, sessions_max=3)
    assert worker.capacity == (3, 40)
    worker.shutdown()
    stage.open(open_request(ONE, positions=29))
    with pytest.raises(Overloaded):
        stage.open(open_request(TWO, positions=37))
    with pytest.raises(UnknownSession):
        stage.held(TWO)
    stage.close(ONE, 3)
    stage.close(ONE, 3)
    assert stage.kv.bytes_used == 0
    stage.open(open_request(TWO, positions=37))


# What a step may carry


def test_a_session_that_is_not_open_is_unknown(stage: Stage) -> None:
    for act in (
        lambda: stage.begin(step(0, (5,))),
        lambda: stage.held(ONE),
        lambda: stage.session_kv(ONE),
        lambda: stage.truncate(ONE, 0),
        lambda: stage.raise_epoch(ONE, 3, 4),
    ):
        with pytest.raises(UnknownSession, match="one"):
            act()


def test_a_step_behind_a_gap_hears_what_is_held(stage: Stage) -> None:
    prefill(opened(stage, ONE), ONE)
    before = state(stage, ONE)
    with pytest.raises(Gap) as gap:
        stage.begin(step(10, (1,)))
    assert gap.value.held == 9
    assert_as_before(stage, ONE, before)
    with pytest.raises(Gap) as gap:
        stage.truncate(ONE, 10)
    assert gap.value.held == 9


def test_a_step_that_starts_earlier_rewinds_and_gives_the_same_token_again(stage: Stage) -> None:
    opened(stage, ONE)
    first = answer(stage, ONE, 6)
    log = (*PROMPTS[ONE], *first)
    for start in (12, 9, 4, 0):
        (result,) = run(stage, step(start, log[start:14]))
        assert token_of(result) == first[5]
        assert stage.held(ONE) == 14


@pytest.mark.parametrize(("epoch", "error"), [(2, Fenced), (4, InvalidRequest)])
def test_a_lower_epoch_is_fenced_and_a_higher_one_must_be_raised_first(
    stage: Stage, epoch: int, error: type[ShoalError]
) -> None:
    prefill(opened(stage, ONE), ONE)
    before = state(stage, ONE)
    with pytest.raises(error, match="epoch 3"):
        stage.begin(step(3, (1,), epoch=epoch))
    assert_as_before(stage, ONE, before)


def test_an_epoch_rises_by_compare_and_set(stage: Stage) -> None:
    prefill(opened(stage, ONE), ONE)
    for expected, epoch in ((2, 5), (4, 5), (3, 3), (3, 2)):
        with pytest.raises(Fenced, match="epoch 3"):
            stage.raise_epoch(ONE, expected, epoch)
    stage.raise_epoch(ONE, 3, 7)
    with pytest.raises(Fenced):
        stage.begin(step(9, (1,), epoch=3))
    with pytest.raises(Fenced):
        stage.raise_epoch(ONE, 3, 8)
    (result,) = run(stage, step(9, (1,), epoch=7))
    assert isinstance(result, StepResult)
    assert result.epoch == 7


@pytest.mark.parametrize("token", [VOCAB, -1, 1 << 40])
def test_token_ids_that_the_vocabulary_does_not_have_are_refused(stage: Stage, token: int) -> None:
    prefill(opened(stage, ONE), ONE)
    before = state(stage, ONE)
    with pytest.raises(InvalidRequest, match=str(token)):
        stage.begin(step(4, (5, token)))
    assert_as_before(stage, ONE, before)


@pytest.mark.parametrize(
    "wrong",
    [
        step(0, ()),
        step(-1, (5, 6)),
        step(9, tuple(range(21))),
        step(9, (5,), until=30),
        step(9, (5, 6), until=10),
        step(9, (5,), rows=torch.zeros((1, HIDDEN))),
        Step(ONE, 3, 9, 10, rows=torch.zeros((1, HIDDEN))),
        Step(ONE, 3, 9, 10),
    ],
    ids=["empty", "negative", "beyond", "until beyond", "until before the end", "ids and rows", "rows", "nothing"],
)
def test_steps_that_do_not_fit_are_refused_and_nothing_is_changed(stage: Stage, wrong: Step) -> None:
    prefill(opened(stage, ONE), ONE)
    before = state(stage, ONE)
    with pytest.raises(InvalidRequest):
        stage.begin(wrong)
    assert_as_before(stage, ONE, before)


@pytest.mark.parametrize(
    "rows",
    [
        None,
        torch.zeros((4, HIDDEN)),
        torch.zeros((3, HIDDEN + 1)),
        torch.zeros((1, 3, HIDDEN)),
        torch.zeros((3, HIDDEN), dtype=torch.bfloat16),
        torch.zeros((3, HIDDEN), dtype=torch.float64),
        torch.zeros((3, HIDDEN), dtype=torch.int64),
        torch.tensor(0.0),
        torch.zeros((HIDDEN,)),
        torch.zeros((0, HIDDEN)),
    ],
    ids=lambda rows: "none" if rows is None else f"{rows.dtype}{tuple(rows.shape)}",
)
@pytest.mark.parametrize("with_ids", [True, False])
def test_rows_of_another_shape_or_dtype_are_refused_by_a_later_stage(
    tiny: Any, rows: torch.Tensor | None, with_ids: bool
) -> None:
    stage = opened(make_stage(tiny, range(1, 3))[0], ONE)
    with pytest.raises(InvalidRequest):
        stage.begin(Step(ONE, 3, 0, 3, tokens=(5, 6, 7) if with_ids else None, rows=rows))
    assert stage.held(ONE) == 0


def test_the_last_stage_needs_the_log_by_the_end_of_the_step(tiny: Any) -> None:
    stage = opened(make_stage(tiny, range(1, 3))[0], ONE)
    with pytest.raises(InvalidRequest, match="log"):
        stage.begin(Step(ONE, 3, 0, 10, rows=torch.zeros((10, HIDDEN))))
    stage.begin(Step(ONE, 3, 0, 9, rows=torch.zeros((9, HIDDEN))))


# All or nothing


def test_a_forward_that_raises_leaves_all_sessions_as_they_were_and_they_go_on_to_the_same_answer(
    faulty: tuple[Stage, FaultyExperts], tiny: Any
) -> None:
    stage, experts = faulty
    undisturbed = opened(make_stage(tiny)[0], ONE, TWO)
    first = prefill(opened(stage, ONE, TWO), ONE, TWO)
    assert prefill(undisturbed, ONE, TWO) == first
    steps = [step(len(PROMPTS[n]), (token,), n) for n, token in zip((ONE, TWO), first, strict=True)]
    for one in steps:
        stage.begin(one)
    before = [state(stage, name) for name in (ONE, TWO)]
    experts.raises = RuntimeError("a peer is lost")
    with pytest.raises(RuntimeError, match="a peer is lost"):
        stage.run([Chunk(one, one.start, one.end) for one in steps])
    for name, was in zip((ONE, TWO), before, strict=True):
        assert_as_before(stage, name, was)
    again = stage.run([Chunk(one, one.start, one.end) for one in steps])
    expected = run(undisturbed, *steps)
    assert [token_of(result) for result in again] == [token_of(result) for result in expected]


def test_what_raises_after_a_neighbour_was_sampled_leaves_that_neighbour_as_it_was_too(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(stage, ONE, TWO, params=SamplingParams(prompt_logprobs=True))
    steps = [step(0, PROMPTS[name], name) for name in (ONE, TWO)]
    for one in steps:
        stage.begin(one)
    before = [state(stage, name) for name in (ONE, TWO)]
    sample = sampler.sample

    def broken(logits: torch.Tensor, params: SamplingParams, log: list[int], *more: Any) -> sampler.Sampled:
        if len(log) == len(PROMPTS[TWO]):
            raise RuntimeError("a bug")
        return sample(logits, params, log, *more)

    chunks = [Chunk(one, one.start, one.end) for one in steps]
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "sample", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            stage.run(chunks)
    for name, was in zip((ONE, TWO), before, strict=True):
        assert_as_before(stage, name, was)
    assert all(isinstance(result, StepResult) for result in stage.run(chunks))


def test_a_session_that_allows_no_token_fails_alone_and_its_kv_stands_still(stage: Stage, tiny: Any) -> None:
    alone = prefill(opened(make_stage(tiny)[0], TWO), TWO)
    opened(stage, ONE, TWO)
    nothing = bytes(VOCAB // 8)
    failed, token = run(stage, step(0, PROMPTS[ONE], ONE, allowed=nothing), step(0, PROMPTS[TWO], TWO))
    assert isinstance(failed, InvalidRequest)
    assert [token_of(token)] == alone
    assert (stage.held(ONE), stage.held(TWO)) == (0, len(PROMPTS[TWO]))
    only = bytes([0, 0b100]) + bytes(VOCAB // 8 - 2)
    (result,) = run(stage, step(0, PROMPTS[ONE], ONE, allowed=only))
    assert token_of(result) == 10


def test_garbage_from_one_expert_fails_the_session_that_asked_it_and_no_other(
    faulty: tuple[Stage, FaultyExperts],
) -> None:
    stage, experts = faulty
    first, second = prefill(opened(stage, ONE, TWO), ONE, TWO)
    steps = step(9, (first,), ONE), step(17, (second,), TWO)
    expected = [token_of(result) for result in run(stage, *steps)]
    of_one, of_two = map(set, experts.chosen)
    experts.garbage = of_one - of_two
    assert experts.garbage, "both sessions ask the same experts: choose other prompts"
    failed, token = run(stage, *steps)
    assert isinstance(failed, NonFinite)
    assert token_of(token) == expected[1]
    assert (stage.held(ONE), stage.held(TWO)) == (9, 18)
    experts.garbage = set()
    (healed,) = run(stage, steps[0])
    assert token_of(healed) == expected[0]


def test_an_expert_that_nobody_computes_fails_the_sessions_that_need_it_and_the_others_answer_as_ever(
    faulty: tuple[Stage, FaultyExperts],
) -> None:
    stage, experts = faulty
    first, second = prefill(opened(stage, ONE, TWO), ONE, TWO)
    steps = step(9, (first,), ONE), step(17, (second,), TWO)
    expected = [token_of(result) for result in run(stage, *steps)]
    of_one, of_two = map(set, experts.chosen)
    experts.lost = of_one - of_two
    failed, token = run(stage, *steps)
    assert isinstance(failed, ExpertsUnreachable)
    assert token_of(token) == expected[1]
    assert (stage.held(ONE), stage.held(TWO)) == (9, 18)
    assert len(experts.chosen) == 1, "the others ran again, together, without it"
    experts.lost = of_one | of_two
    assert all(isinstance(result, ExpertsUnreachable) for result in run(stage, *steps))
    experts.lost = set()
    (healed,) = run(stage, steps[0])
    assert token_of(healed) == expected[0]


def test_a_row_that_is_lost_outside_the_batch_is_our_bug(faulty: tuple[Stage, FaultyExperts]) -> None:
    stage, experts = faulty
    opened(stage, ONE)
    experts.raises = RowsLost({99: ExpertsUnreachable("nobody's")})
    with pytest.raises(BrokenInvariant):
        prefill(stage, ONE)


def test_all_rows_of_a_forward_fit_one_frame(stage: Stage) -> None:
    row_bytes = HIDDEN * 4
    assert stage.rows_max * row_bytes <= FRAME_BYTES_MAX - FRAME_HEADER_BYTES_MAX < (stage.rows_max + 1) * row_bytes


def test_garbage_in_a_prompt_s_logprobs_fails_the_session_that_asked_for_them_and_no_other(
    faulty: tuple[Stage, FaultyExperts],
) -> None:
    """A long prompt of which only one row went to the bad expert, and a running answer beside it."""
    stage, experts = faulty
    (first,) = prefill(opened(stage, ONE), ONE)
    opened(stage, TWO, params=SamplingParams(prompt_logprobs=True))
    chunk = Step(TWO, 3, 0, len(PROMPTS[TWO]), PROMPTS[TWO])
    expected = [token_of(result) for result in run(stage, chunk, step(9, (first,), ONE))]
    *prompt, answering = map(set, experts.chosen)
    experts.garbage = set.union(*prompt) - answering
    assert experts.garbage
    failed, token = run(stage, chunk, step(9, (first,), ONE))
    assert isinstance(failed, NonFinite)
    assert token_of(token) == expected[1]
    assert (stage.held(TWO), stage.held(ONE)) == (0, 10)
    experts.garbage = set()
    (healed,) = run(stage, chunk)
    assert isinstance(healed, StepResult)
    assert (healed.token, len(healed.prompt_logprobs or ())) == (expected[0], len(PROMPTS[TWO]) - 1)


# Logprobs of the prompt


def reference_logprobs(tiny: Any, prompt: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        return tiny(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]


def assert_complete(tiny: Any, result: StepResult | ShoalError) -> None:
    assert isinstance(result, StepResult), result
    assert result.prompt_logprobs is not None
    expected = reference_logprobs(tiny, PROMPTS[TWO])
    torch.testing.assert_close(torch.tensor(result.prompt_logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 17])
def test_a_prompt_in_chunks_gives_all_its_logprobs_with_the_last_one(stage: Stage, tiny: Any, size: int) -> None:
    opened(stage, TWO, params=SamplingParams(prompt_logprobs=True))
    whole = step(0, PROMPTS[TWO], TWO)
    stage.begin(whole)
    results: list[StepResult | ShoalError] = []
    for at in range(0, whole.end, size):
        results += stage.run([Chunk(whole, at, min(whole.end, at + size))])
    assert all(isinstance(result, StepResult) and result.prompt_logprobs is None for result in results[:-1])
    assert_complete(tiny, results[-1])


@pytest.mark.parametrize(("held", "start"), [(10, 10), (10, 9), (10, 4), (10, 0), (17, 16), (17, 3)])
def test_rewound_in_the_middle_of_the_prompt_its_logprobs_are_complete(
    stage: Stage, tiny: Any, held: int, start: int
) -> None:
    opened(stage, TWO, params=SamplingParams(prompt_logprobs=True))
    run(stage, step(0, PROMPTS[TWO][:held], TWO, until=len(PROMPTS[TWO])))
    (result,) = run(stage, step(start, PROMPTS[TWO][start:], TWO))
    assert_complete(tiny, result)


def test_logprobs_of_the_prompt_are_given_once(stage: Stage) -> None:
    opened(stage, TWO, params=SamplingParams(prompt_logprobs=True))
    prompt = PROMPTS[TWO]
    (first,) = run(stage, step(0, prompt, TWO))
    (second,) = run(stage, step(len(prompt), (token_of(first),), TWO))
    assert isinstance(second, StepResult)
    assert second.prompt_logprobs is None


def test_a_prompt_s_head_runs_in_blocks_of_bounded_size(
    stage: Stage, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "PROMPT_BLOCK_BYTES_MAX", 3 * 4 * VOCAB + 1)
    opened(stage, TWO, params=SamplingParams(prompt_logprobs=True))
    sizes, head = [], stage.body.head

    def counted(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return head(rows)

    stage.body.head = counted  # type: ignore[method-assign]
    (result,) = run(stage, step(0, PROMPTS[TWO], TWO))
    assert sorted(sizes) == [1, 1, 3, 3, 3, 3, 3]
    assert_complete(tiny, result)


def test_a_prompt_of_one_token_has_no_logprobs_but_the_empty_ones(stage: Stage) -> None:
    stage.open(open_request(ONE, log=(5,), prompt_len=1, params=SamplingParams(prompt_logprobs=True)))
    (result,) = run(stage, step(0, (5,)))
    assert isinstance(result, StepResult)
    assert result.prompt_logprobs == ()


def test_a_stage_that_took_over_in_the_middle_of_a_prompt_asks_for_the_rows_whose_logprobs_it_does_not_have(
    tiny: Any,
) -> None:
    """KV can be moved; the scores of the rows before it are nowhere but on the stage that is lost."""
    lost, successor = make_stage(tiny)[0], make_stage(tiny)[0]
    for stage in (lost, successor):
        opened(stage, TWO, params=SamplingParams(prompt_logprobs=True))
    prompt = PROMPTS[TWO]
    run(lost, step(0, prompt[:10], TWO, until=len(prompt)))
    kv = lost.session_kv(TWO)
    successor.session_kv(TWO).restore(0, {layer: kv.export(layer, 0, 10) for layer in kv.keys})
    with pytest.raises(Gap) as gap:
        successor.begin(step(10, prompt[10:], TWO))
    assert gap.value.held == 0
    (result,) = run(successor, step(0, prompt, TWO))
    assert_complete(tiny, result)


def test_a_stage_that_took_over_after_the_prompt_goes_on_without_its_logprobs(tiny: Any) -> None:
    lost, successor = make_stage(tiny)[0], make_stage(tiny)[0]
    params = SamplingParams(prompt_logprobs=True)
    prompt = PROMPTS[TWO]
    (first,) = run(opened(lost, TWO, params=params), step(0, prompt, TWO))
    log = (*prompt, token_of(first))
    opened(successor, TWO, params=params, log=log)
    kv = lost.session_kv(TWO)
    successor.session_kv(TWO).restore(0, {layer: kv.export(layer, 0, len(prompt)) for layer in kv.keys})
    (ours,) = run(successor, step(len(prompt), log[-1:], TWO))
    (theirs,) = run(lost, step(len(prompt), log[-1:], TWO))
    assert token_of(ours) == token_of(theirs)


# Sampling sees the log


def test_a_rewound_session_samples_with_the_log_of_that_position(tiny: Any) -> None:
    """The keyed draw and the penalties depend on the log: what was drawn before the rewind must not stand in it."""
    params = SamplingParams(temperature=1.5, seed=3, repetition_penalty=1.3, frequency_penalty=0.5)
    stage = opened(make_stage(tiny)[0], ONE, params=params)
    tokens = answer(stage, ONE, 8)
    log = (*PROMPTS[ONE], *tokens)
    for start in (15, 11, 9):
        (result,) = run(stage, step(start, log[start:16]))
        assert token_of(result) == tokens[7]


def test_a_chain_of_stages_answers_what_its_last_stage_samples() -> None:
    """The later stage is given rows alone, as a route does: the tokens come from its own log."""
    tiny = model("mixtral")
    whole, cut = Chain(tiny), Chain(tiny, cuts=(1, 2))
    params = SamplingParams(temperature=0.8, seed=5, presence_penalty=0.7)
    for chain in (whole, cut):
        session = chain.open("one", PROMPTS[ONE], 6, params)
        for _ in range(6):
            chain.feed(session)
    assert cut.answers[session].log == whole.answers[session].log


def test_a_closed_session_s_kv_is_given_back_to_the_machine_at_once(tiny: Any) -> None:
    stage, _ = make_stage(tiny)
    stage.open(open_request(ONE))
    prompt = PROMPTS[ONE]
    run(stage, step(0, prompt))
    slab = weakref.ref(next(iter(stage.session_kv(ONE).keys.values())))
    stage.close(ONE, 3)
    gc.collect()
    assert slab() is None
