"""How the next token is chosen: the parameters of one answer, checked once, here.

Pure. The semantics are in PROTOCOL.md, section 6; shard.sampler carries them out.
"""

from dataclasses import dataclass

from protos.errors import InvalidRequest
from protos.limits import (
    ADDITIVE_PENALTY_MAX,
    CHOICES_MAX,
    OUTPUT_TOKENS_MAX,
    REPETITION_PENALTY_MAX,
    REPETITION_PENALTY_MIN,
    SEED_MAX,
    STOP_TOKENS_MAX,
    TEMPERATURE_MAX,
    TEMPERATURE_MIN,
    TOKEN_ID_MAX,
    TOP_LOGPROBS_MAX,
    VOCAB_MAX,
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Raises InvalidRequest, naming the field and its range."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0: greedy. Everything after temperature in the order of processors is then without effect."""
    top_k: int = 0
    """0: off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    choice: int = 0
    """Which of several answers to one request: equal seeds, different random numbers."""
    stop_tokens: tuple[int, ...] = ()
    logprobs: int | None = None
    """None: off; n: the chosen token's logprob and those of the n most likely."""
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        _whole("max_tokens", self.max_tokens, 1, OUTPUT_TOKENS_MAX)
        if self.temperature != 0:
            _real("temperature", self.temperature, TEMPERATURE_MIN, TEMPERATURE_MAX, "0, or ")
        _whole("top_k", self.top_k, 0, VOCAB_MAX)
        _real("top_p", self.top_p, 0.0, 1.0)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, REPETITION_PENALTY_MIN, REPETITION_PENALTY_MAX)
        _real("presence_penalty", self.presence_penalty, -ADDITIVE_PENALTY_MAX, ADDITIVE_PENALTY_MAX)
        _real("frequency_penalty", self.frequency_penalty, -ADDITIVE_PENALTY_MAX, ADDITIVE_PENALTY_MAX)
        _whole("seed", self.seed, 0, SEED_MAX)
        _whole("choice", self.choice, 0, CHOICES_MAX - 1)
        if len(self.stop_tokens) > STOP_TOKENS_MAX:
            raise InvalidRequest(f"stop_tokens: {len(self.stop_tokens)} ids; at most {STOP_TOKENS_MAX} are allowed")
        for token in self.stop_tokens:
            _whole("stop_tokens", token, 0, TOKEN_ID_MAX)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, TOP_LOGPROBS_MAX)


def _whole(field: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{field} is {value!r}; it must be a whole number from {low} to {high}")


def _real(field: str, value: object, low: float, high: float, also: str = "") -> None:
    # NaN compares false with everything, infinity is above every limit.
    if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
        raise InvalidRequest(f"{field} is {value!r}; it must be {also}a number from {low} to {high}")
