from dataclasses import FrozenInstanceError

import pytest

from protos import limits
from protos.errors import InvalidRequest
from protos.sampling import SamplingParams

EDGES = {
    "max_tokens": (1, limits.OUTPUT_TOKENS_MAX),
    "top_k": (0, limits.VOCAB_MAX),
    "seed": (0, limits.SEED_MAX),
    "choice": (0, limits.CHOICES_MAX - 1),
    "logprobs": (0, limits.TOP_LOGPROBS_MAX),
}
REAL_EDGES = {
    "temperature": (limits.TEMPERATURE_MIN, limits.TEMPERATURE_MAX),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (limits.REPETITION_PENALTY_MIN, limits.REPETITION_PENALTY_MAX),
    "presence_penalty": (-limits.ADDITIVE_PENALTY_MAX, limits.ADDITIVE_PENALTY_MAX),
    "frequency_penalty": (-limits.ADDITIVE_PENALTY_MAX, limits.ADDITIVE_PENALTY_MAX),
}


def test_the_default_is_greedy_and_changes_nothing():
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.repetition_penalty, params.logprobs) == (0.0, 1.0, 1.0, None)


@pytest.mark.parametrize(("field", "edges"), EDGES.items())
def test_whole_numbers_reach_their_limits_and_not_beyond(field: str, edges: tuple[int, int]):
    low, high = edges
    for value in (low, high):
        assert getattr(SamplingParams(**{field: value}), field) == value
    for value in (low - 1, high + 1, True, 1.5, "1"):
        with pytest.raises(InvalidRequest, match=f"^{field} is .* whole number from {low} to {high}$"):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(("field", "edges"), REAL_EDGES.items())
def test_real_numbers_reach_their_limits_and_not_beyond(field: str, edges: tuple[float, float]):
    low, high = edges
    for value in (low, high):
        assert getattr(SamplingParams(**{field: value}), field) == value
    for value in (low - 1e-7, high * 1.000001, float("nan"), float("inf"), -float("inf"), True, "1", 10**400):
        with pytest.raises(InvalidRequest, match=f"^{field} is .* from {low} to {high}$"):
            SamplingParams(**{field: value})


def test_stop_tokens_are_few_and_are_token_ids():
    SamplingParams(stop_tokens=(limits.TOKEN_ID_MAX,) * limits.STOP_TOKENS_MAX)
    with pytest.raises(InvalidRequest, match="stop_tokens: 65 ids; at most 64"):
        SamplingParams(stop_tokens=(0,) * (limits.STOP_TOKENS_MAX + 1))
    with pytest.raises(InvalidRequest, match="stop_tokens is"):
        SamplingParams(stop_tokens=(limits.TOKEN_ID_MAX + 1,))


def test_parameters_do_not_change():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().seed = 1  # type: ignore[misc]
