"""The sampler against transformers' processors, against published formulas, and against itself on every machine.
Law: one seed a test; processed logits are compared bit by bit."""

import hashlib
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as oracle

from protos.errors import InvalidRequest, NonFinite
from protos.sampling import SamplingParams
from shard import sampler
from shard.sampler import Sampled, needs_log, processed, prompt_logprobs, sample, uniform

VOCAB = 1003
LOG = [5, 17, 900, 5, 2, 44, 17, 1002, 5, 3]
PROMPT_LEN = 6

GOLDEN_UNIFORM = [
    "0x1.33c6d7e50cfb6p-1",
    "0x1.c344072f17148p-1",
    "0x1.2554bd92f194ap-2",
    "0x1.4e3e6d1219270p-1",
    "0x1.76d40ec0dc7f0p-1",
]
GOLDEN_TOKENS = (
    [38, 430, 245, 324, 177, 344, 482, 151, 53, 117, 140, 472],
    [38, 433, 241, 324, 177, 354, 482, 151, 49, 113, 147, 482],
)
GOLDEN_EXP = "a845cbf47eac3a154e55ae0accdab1341cfd93776de1072b4406daa33e95dbed"
"""Also what the same steps give in Python"s own floats, one number at a time."""


def row(seed: int = 0, vocab: int = VOCAB, spread: float = 4.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * spread


def params(**fields: float) -> SamplingParams:
    return SamplingParams(**{"temperature": 1.0} | fields)


def transformers_processed(logits: torch.Tensor, p: SamplingParams, log: list[int]) -> torch.Tensor:
    """The processors that `generate` builds, in its order (generation/utils.py, _get_logits_processor)."""
    built: list[oracle.LogitsProcessor] = []
    if p.repetition_penalty != 1.0:
        built.append(oracle.RepetitionPenaltyLogitsProcessor(p.repetition_penalty))
    if p.temperature and p.temperature != 1.0:
        built.append(oracle.TemperatureLogitsWarper(p.temperature))
    if p.temperature and p.top_k:
        built.append(oracle.TopKLogitsWarper(p.top_k))
    if p.temperature and p.top_p < 1.0:
        built.append(oracle.TopPLogitsWarper(p.top_p))
    if p.temperature:
        built.append(oracle.MinPLogitsWarper(p.min_p))
    scores = logits.to(torch.float32)[None]
    return oracle.LogitsProcessorList(built)(torch.tensor([log]), scores)[0]


def assert_bits_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype == torch.float32
    assert torch.equal(ours.view(torch.int32), theirs.contiguous().view(torch.int32))


GRID = {
    "temperature": (0.05, 0.7, 1.0, 1.3, 7.0),
    "top_k": (0, 1, 2, 40, VOCAB - 1, VOCAB, 5000),
    "top_p": (0.0, 0.1, 0.5, 0.9, 0.999, 1.0),
    "min_p": (0.0, 0.01, 0.3, 1.0),
    "repetition_penalty": (0.8, 1.0, 1.1, 2.5),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in GRID.items() for value in values])
def test_each_parameter_alone_gives_transformers_logits_to_the_bit(field: str, value: float) -> None:
    for seed in range(5):
        p = params(**{field: value})
        assert_bits_equal(processed(row(seed), p, LOG, PROMPT_LEN), transformers_processed(row(seed), p, LOG))


def test_all_combinations_give_transformers_logits_to_the_bit() -> None:
    for seed, values in enumerate(itertools.product(*GRID.values())):
        p = params(**dict(zip(GRID, values, strict=True)))
        logits = row(seed, spread=2.0)
        assert_bits_equal(processed(logits, p, LOG, PROMPT_LEN), transformers_processed(logits, p, LOG))


def test_a_large_vocabulary_gives_transformers_logits_to_the_bit() -> None:
    p = params(temperature=0.8, top_k=20_000, top_p=0.95, min_p=1e-4, repetition_penalty=1.1)
    for seed in range(3):
        logits = row(seed, vocab=151_936)
        assert_bits_equal(processed(logits, p, LOG, PROMPT_LEN), transformers_processed(logits, p, LOG))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_processed_in_float32_as_generate_does(dtype: torch.dtype) -> None:
    logits = row(spread=3.0).to(dtype)
    p = params(temperature=0.9, top_k=100, min_p=0.01)
    assert_bits_equal(processed(logits, p, LOG, PROMPT_LEN), transformers_processed(logits, p, LOG))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_drops_the_lowest_ids_of_equal_logits_as_a_stable_sort_does(p: float) -> None:
    logits = row(3).round()
    ascending, order = torch.sort(logits, stable=True)
    dropped = (ascending.softmax(-1).cumsum(-1) <= 1 - p).scatter(0, order, ascending.softmax(-1).cumsum(-1) <= 1 - p)
    assert_bits_equal(processed(logits, params(top_p=p), LOG, PROMPT_LEN), logits.masked_fill(dropped, -torch.inf))


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_top_p_drops_probabilities_that_add_up_to_exactly_the_rest(p: float) -> None:
    logits = torch.zeros(4)
    assert_bits_equal(processed(logits, params(top_p=p), [], 0), transformers_processed(logits, params(top_p=p), [0]))


def test_logits_of_minus_infinity_stay_and_are_never_chosen() -> None:
    logits = row()
    logits[::2] = -torch.inf
    p = params(temperature=0.5, top_k=900, top_p=0.99, min_p=1e-6, repetition_penalty=1.2)
    assert_bits_equal(processed(logits, p, LOG, PROMPT_LEN), transformers_processed(logits, p, LOG))
    assert all(sample(logits, params(), range(n), 0).token % 2 for n in range(500))


def test_greedy_ignores_the_warpers() -> None:
    p = params(temperature=0.0, top_k=1, top_p=0.1, min_p=0.5, repetition_penalty=1.3)
    bare = params(temperature=0.0, repetition_penalty=1.3)
    assert_bits_equal(processed(row(), p, LOG, PROMPT_LEN), transformers_processed(row(), bare, LOG))


@pytest.mark.parametrize(("presence", "frequency"), [(0.7, 0.0), (0.0, 0.3), (-1.5, 2.0), (0.25, -0.5)])
def test_presence_and_frequency_follow_the_published_formula(presence: float, frequency: float) -> None:
    """OpenAI API reference: mu[j] -> mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence."""
    counts = Counter(LOG[PROMPT_LEN:])
    expected = [
        mu - counts[j] * frequency - float(counts[j] > 0) * presence for j, mu in enumerate(row().double().tolist())
    ]
    p = params(temperature=0.0, presence_penalty=presence, frequency_penalty=frequency)
    ours = processed(row(), p, LOG, PROMPT_LEN)
    assert torch.allclose(ours.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-6)
    untouched = [j for j in range(VOCAB) if j not in counts]
    assert torch.equal(ours[untouched], row()[untouched])


def test_presence_and_frequency_come_after_repetition_and_before_temperature() -> None:
    logits = torch.tensor([4.0, -4.0, 1.0])
    p = params(temperature=2.0, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.5)
    assert processed(logits, p, [0, 1, 1], 1).tolist() == [1.0, (-8.0 - 2 * 0.5 - 1.0) / 2, 0.5]


def test_log_tokens_beyond_the_row_are_ignored_as_in_transformers() -> None:
    p = params(repetition_penalty=1.5)
    log = [*LOG, VOCAB, VOCAB + 70_000]
    assert_bits_equal(processed(row(), p, log, PROMPT_LEN), transformers_processed(row(), p, log))
    all_three = params(repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=1.0)
    assert_bits_equal(processed(row(), all_three, log, 6), processed(row(), all_three, LOG, 6))


@pytest.mark.parametrize("fields", [{}, {"logprobs": 3}, {"temperature": 0.7, "top_p": 0.9}])
def test_the_content_of_the_log_is_read_only_if_needs_log_says_so(fields: dict[str, float]) -> None:
    p = params(**fields)
    assert not needs_log(p)
    assert sample(row(), p, range(len(LOG)), PROMPT_LEN) == sample(row(), p, LOG, PROMPT_LEN)


@pytest.mark.parametrize("field", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_penalties_need_the_log(field: str) -> None:
    assert needs_log(params(**{field: 0.5}))


def bitset(tokens: list[int], vocab: int = VOCAB) -> bytes:
    bits = bytearray((vocab + 7) // 8)
    for token in tokens:
        bits[token // 8] |= 1 << token % 8
    return bytes(bits)


def test_only_allowed_tokens_keep_their_logits() -> None:
    tokens = [0, 7, 8, 500, VOCAB - 1]
    ours = processed(row(), params(temperature=0.0), LOG, PROMPT_LEN, bitset(tokens))
    expected = torch.full((VOCAB,), -torch.inf)
    expected[tokens] = row()[tokens]
    assert_bits_equal(ours, expected)


def test_a_draw_and_a_greedy_choice_stay_inside_the_allowed_set() -> None:
    tokens = [3, 64, 1001]
    drawn = {sample(row(), params(temperature=5.0), range(n), 0, bitset(tokens)).token for n in range(200)}
    assert drawn == set(tokens)
    best = max(tokens, key=lambda token: float(row()[token]))
    assert sample(row(), params(temperature=0.0), LOG, PROMPT_LEN, bitset(tokens)).token == best


def test_bits_beyond_the_vocabulary_allow_nothing() -> None:
    padding = bytearray(bitset([]))
    padding[-1] |= 0b1111_1000
    with pytest.raises(InvalidRequest, match="empty"):
        sample(row(), params(), LOG, PROMPT_LEN, bytes(padding))


@pytest.mark.parametrize("length", [0, 125, 127])
def test_a_bitset_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(InvalidRequest, match="needs 126"):
        sample(row(), params(), LOG, PROMPT_LEN, b"\xff" * length)


def test_an_allowed_set_of_tokens_that_the_model_excludes_is_refused() -> None:
    logits = row()
    logits[[4, 9]] = -torch.inf
    with pytest.raises(InvalidRequest, match="every allowed token"):
        sample(logits, params(), LOG, PROMPT_LEN, bitset([4, 9]))


def test_greedy_takes_the_lowest_of_equal_logits() -> None:
    logits = torch.zeros(VOCAB)
    logits[[400, 77, 900]] = 3.0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert sample(logits.to(dtype), params(temperature=0.0), LOG, PROMPT_LEN).token == 77
    assert sample(logits, params(temperature=0.0, presence_penalty=0.1), [5], 0).token == 77


def test_greedy_agrees_with_torch_argmax() -> None:
    for seed in range(20):
        logits = row(seed).to(torch.bfloat16)
        expected = int(torch.argmax(logits.to(torch.float32)))
        assert sample(logits, params(temperature=0.0), LOG, PROMPT_LEN) == Sampled(expected, None, ())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("fields", [{"temperature": 0.0}, {"temperature": 0.0, "logprobs": 1}, {"top_p": 0.5}])
def test_one_nan_or_infinity_in_the_logits_is_an_error(bad: float, fields: dict[str, float]) -> None:
    logits = row()
    logits[321] = bad
    with pytest.raises(NonFinite, match="garbage"):
        sample(logits, params(**fields), LOG, PROMPT_LEN)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_all_minus_infinity_are_an_error(temperature: float) -> None:
    with pytest.raises(NonFinite):
        sample(torch.full((VOCAB,), -torch.inf), params(temperature=temperature), LOG, PROMPT_LEN)


def test_logits_that_overflow_when_processed_are_an_error() -> None:
    with pytest.raises(NonFinite):
        sample(row() * 1e33, params(temperature=1e-6, top_p=0.9, min_p=0.1), LOG, PROMPT_LEN)


def test_the_logits_are_not_changed() -> None:
    logits, before = row(), row()
    p = params(temperature=0.5, top_k=9, top_p=0.5, min_p=0.1, repetition_penalty=2.0, presence_penalty=1.0, logprobs=4)
    sample(logits, p, LOG, PROMPT_LEN, b"\xff" * 126)
    processed(logits, params(), LOG, PROMPT_LEN).fill_(7.0)
    assert torch.equal(logits, before)


def test_the_draw_has_transformers_distribution() -> None:
    """Chi-square of 20 000 positions against the softmax of transformers' warped logits, at 4.9 sigma."""
    p = params(temperature=0.8, top_k=30, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=11)
    logits = row(spread=1.5)
    expected = transformers_processed(logits, p, LOG).double().softmax(-1).numpy()
    scores = processed(logits, p, LOG, PROMPT_LEN).numpy()
    draws = 20_000
    counts = np.bincount([sampler._draw(scores, uniform(11, 0, n)) for n in range(draws)], minlength=VOCAB)
    kept = expected > 0
    assert not counts[~kept].any()
    chi2 = float((np.square(counts[kept] - draws * expected[kept]) / (draws * expected[kept])).sum())
    free = int(kept.sum()) - 1
    wilson_hilferty = ((chi2 / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    assert abs(wilson_hilferty) < 4.9


def test_the_draw_inverts_the_cumulative_distribution_in_id_order() -> None:
    scores = np.log(np.array([0.1, 0.2, 0.3, 0.4], dtype=np.float32))
    edges = {0.0: 0, 0.099: 0, 0.101: 1, 0.299: 1, 0.301: 2, 0.599: 2, 0.601: 3, 1 - 2**-53: 3}
    assert {u: sampler._draw(scores, u) for u in edges} == edges
    assert [sampler._draw(np.zeros(4, np.float32), u) for u in (0.0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]


def test_the_draw_across_blocks_equals_an_exact_sum() -> None:
    scores = row(vocab=20_011).numpy()
    exact = np.cumsum([math.exp(x) for x in scores.astype(np.float64) - float(scores.max())])
    for n in range(300):
        u = uniform(1, 2, n)
        assert sampler._draw(scores, u) == int(np.searchsorted(exact, u * exact[-1], side="right"))


def test_sample_keys_its_random_number_by_seed_choice_and_position() -> None:
    scores = processed(row(), params(), LOG, PROMPT_LEN).numpy()
    for seed, choice, position in [(0, 0, 0), (2**64 - 1, 0, 5), (7, 3, 100_000)]:
        p = params(seed=seed, choice=choice)
        expected = sampler._draw(scores, uniform(seed, choice, position))
        assert sample(row(), p, range(position), 0).token == expected


def test_random_numbers_are_the_first_53_bits_of_the_keyed_hash() -> None:
    data = (5).to_bytes(8, "little") + (1).to_bytes(8, "little") + (9).to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"shoal-sample").digest()
    assert uniform(5, 1, 9) == int(f"{int.from_bytes(digest, 'big'):064b}"[:53], 2) / 2**53


def test_golden_random_numbers_never_change() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (2**64 - 1, 127, 2**24)]
    assert [uniform(*key).hex() for key in keys] == GOLDEN_UNIFORM


def test_golden_tokens_never_change() -> None:
    """Logits that every machine makes alike: small integers over 8."""
    logits = torch.tensor([((i * 7919) % 64 - 32) / 8 for i in range(512)])
    plain = [sample(logits, params(seed=42), range(n), 0).token for n in range(12)]
    warped = [sample(logits, params(seed=42, temperature=0.5, top_k=60), range(n), 0).token for n in range(12)]
    assert (plain, warped) == GOLDEN_TOKENS


def test_golden_exponentials_are_the_same_on_every_machine() -> None:
    x = -np.arange(70_100, dtype=np.float64) / 100
    assert hashlib.sha256(sampler._exp(x).astype("<f8").tobytes()).hexdigest() == GOLDEN_EXP


def test_exponentials_are_within_one_unit_in_the_last_place() -> None:
    x = np.concatenate([-np.linspace(0, 699.9, 20_000), -np.logspace(-12, 0, 1000)])
    exact = np.array([math.exp(value) for value in x])
    assert (np.abs(sampler._exp(x) - exact) <= np.spacing(exact)).all()
    assert sampler._exp(np.array([-701.0, -1e30, -np.inf])).tolist() == [0.0, 0.0, 0.0]


def test_logprobs_are_of_the_raw_logits() -> None:
    expected = torch.log_softmax(row(), -1)
    p = params(temperature=0.3, top_k=1, repetition_penalty=3.0, logprobs=5)
    chosen = sample(row(), p, LOG, PROMPT_LEN, bitset([10, 11]))
    assert chosen.logprob == float(expected[chosen.token])
    values, tokens = expected.topk(5)
    assert chosen.top == tuple(zip(tokens.tolist(), values.tolist(), strict=True))


def test_top_logprobs_name_the_lowest_of_equal_tokens_first() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, 1.0])
    chosen = sample(logits, params(temperature=0.0, logprobs=4), [], 0)
    assert [token for token, _ in chosen.top] == [1, 3, 2, 4]


def test_logprobs_may_be_of_the_chosen_token_only_or_of_more_than_there_are() -> None:
    only = sample(row(), params(logprobs=0), LOG, PROMPT_LEN)
    assert only.logprob is not None
    assert only.top == ()
    assert len(sample(torch.tensor([1.0, 2.0]), params(logprobs=20), [], 0).top) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompt_logprobs_in_blocks_equal_log_softmax_at_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.stack([row(seed) for seed in range(11)]).to(dtype)
    targets = torch.arange(11) * 91
    expected = torch.log_softmax(logits.float(), -1)[torch.arange(11), targets].tolist()
    assert prompt_logprobs(logits, targets) == expected
    monkeypatch.setattr(sampler, "PROMPT_BLOCK_BYTES_MAX", 3 * 4 * VOCAB)
    assert prompt_logprobs(logits, targets) == expected
    monkeypatch.setattr(sampler, "PROMPT_BLOCK_BYTES_MAX", 1)
    assert prompt_logprobs(logits, targets) == expected


def test_prompt_logprobs_name_the_row_that_is_not_finite() -> None:
    logits = torch.stack([row(seed) for seed in range(4)])
    logits[1, 3] = -torch.inf
    assert prompt_logprobs(logits, torch.tensor([0, 3, 0, 0]))[1] == -math.inf
    logits[2, 5] = torch.nan
    with pytest.raises(NonFinite, match="row 2 of 4"):
        prompt_logprobs(logits, torch.tensor([0, 3, 0, 0]))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: sampling from a GPU's logits was NOT tested")
def test_logits_on_a_gpu_give_the_same_tokens() -> None:
    for p in (params(temperature=0.0), params(temperature=0.7, top_p=0.9, logprobs=2)):
        assert sample(row().cuda(), p, LOG, PROMPT_LEN) == sample(row(), p, LOG, PROMPT_LEN)
