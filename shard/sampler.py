"""The next token of one row of logits: processors, the keyed draw, logprobs.
Law: processed logits equal transformers' to the bit; equal ones give the same token on every machine.

Order, as transformers 5.23 builds it in `generate`: repetition penalty; then, where `generate` puts custom processors,
presence and frequency penalty and the allowed-token set; then, unless greedy: temperature, top-k, top-p, min-p.
Greedy is the argmax after the first two groups; of equal logits the lowest token id.

Where the processors of transformers are slow, the same result is reached another way: top-p needs the values sorted,
but not their ids (50 000 logits: 0.1 ms instead of 4). Of logits equal to the smallest that top-p keeps it drops the
lowest ids first, as a stable sort does; transformers sorts unstably, so which it drops depends on the machine.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from protos.errors import BrokenInvariant, InvalidRequest, NonFinite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from protos.sampling import SamplingParams

    Row = NDArray[np.float32]

PROMPT_BLOCK_BYTES_MAX: Final = 64 * 1024 * 1024
"""Float32 logprobs of the prompt that exist at once."""

LN2_HIGH: Final = 6.93147180369123816490e-01
LN2_LOW: Final = 1.90821492927058770002e-10
"""ln 2 in two parts, the first with 32 zero bits at its end, so that `k * LN2_HIGH` is exact (fdlibm, e_exp.c)."""

EXP_TAYLOR: Final = tuple(1 / math.factorial(n) for n in range(13, -1, -1))
"""Down to 1/0!. For |r| <= ln(2)/2 the rest of the series is below 2**-57."""

EXP_ZERO_BELOW: Final = -700.0
"""Keeps results away from denormals, which some machines flush; no draw of 53 bits can tell e**-700 from 0."""

EXP_BLOCK: Final = 8192
"""Tokens whose probabilities are computed at once: 64 KiB arrays stay in the cache and in malloc's heap, where larger
ones are mapped and faulted in anew for each step of the series (50 000 tokens: 0.6 ms instead of 2)."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """`logprob` and `top` (likeliest first, of equals the lowest id) are of the raw logits; None and () if off."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


def needs_log(params: SamplingParams) -> bool:
    """Whether `sample` reads what is in the log; if not, only its length counts and `range(length)` serves as well."""
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)


def sample(
    logits: torch.Tensor,
    params: SamplingParams,
    log: Sequence[int],
    prompt_len: int,
    allowed: bytes | None = None,
) -> Sampled:
    """Chooses the token at position len(log).

    logits: [V], any float dtype and device, not changed. log: prompt and generated tokens so far (an `array` of int64
    is read without a copy). allowed: bit i of byte i // 8, lowest first, is token i; None allows all.
    Raises NonFinite on logits that hold NaN or +inf or are all -inf, InvalidRequest on an `allowed` of the wrong
    length or without a token that has a finite logit.
    """
    if not params.temperature and allowed is None and not needs_log(params):
        token = _greedy(logits)
    else:
        scores = _process(_checked(_row(logits)), params, log, prompt_len, allowed)
        token = _draw(scores, uniform(params.seed, params.choice, len(log))) if params.temperature else _argmax(scores)
    if params.logprobs is None:
        return Sampled(token, None, ())
    logprobs = _log_softmax(_checked(_row(logits)))
    return Sampled(token, float(logprobs[token]), _top(logprobs, params.logprobs))


def processed(
    logits: torch.Tensor,
    params: SamplingParams,
    log: Sequence[int],
    prompt_len: int,
    allowed: bytes | None = None,
) -> torch.Tensor:
    """float32 [V] on the CPU: what the greedy choice or the draw is made of. Arguments and errors as for `sample`."""
    return torch.from_numpy(_process(_checked(_row(logits)), params, log, prompt_len, allowed).copy())


def prompt_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    """log_softmax in float32 of logits [T, V] at targets [T] (int64), PROMPT_BLOCK_BYTES_MAX of rows at a time.

    -inf where the model excludes the target. Raises NonFinite, naming the row within this call.
    """
    rows, vocab = logits.shape
    block = max(1, PROMPT_BLOCK_BYTES_MAX // (4 * vocab))
    found: list[float] = []
    for start in range(0, rows, block):
        logprobs = torch.log_softmax(logits[start : start + block].detach(), dim=-1, dtype=torch.float32)
        at = targets[start : start + block].to(logprobs.device).unsqueeze(1)
        found += logprobs.gather(1, at).squeeze(1).tolist()
    for row, logprob in enumerate(found):
        if math.isnan(logprob):
            raise NonFinite(f"row {row} of {rows} of the prompt's logits holds NaN or +inf, or is all -inf")
    return found


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number of a position, in [0, 1): the first 53 bits of BLAKE2b-64 (person "shoal-sample") of the three
    as little-endian 64-bit integers; the digest's first byte is the most significant."""
    data = struct.pack("<QQQ", seed, choice, position)
    digest = blake2b(data, digest_size=8, person=b"shoal-sample").digest()
    return float(int.from_bytes(digest, "big") >> 11) * 2.0**-53


def _row(logits: torch.Tensor) -> Row:
    """float32 on the CPU; a view where it can be, so nobody writes to it."""
    if logits.ndim != 1 or not len(logits):
        raise BrokenInvariant(f"the sampler takes one row of logits, not the shape {tuple(logits.shape)}")
    row: Row = logits.detach().to("cpu", torch.float32).numpy()
    return row


def _checked(row: Row) -> Row:
    _check_best(float(row.max()), len(row))
    return row


def _check_best(best: float, vocab: int) -> None:
    """The maximum of a row says it all: NaN spreads to it, and -inf is it only if nothing is above."""
    if not math.isfinite(best):
        raise NonFinite(f"the largest of a row of {vocab} logits is {best}; the model or a peer computed garbage")


def _greedy(logits: torch.Tensor) -> int:
    """One argmax and nothing else. A device finds it itself; on the CPU numpy's takes a tenth of torch's time."""
    if logits.device.type == "cpu":
        row = _row(logits)
        token = _argmax(row)
        best = float(row[token])
    else:
        token = int(logits.argmax())
        best = float(logits[token])
    _check_best(best, len(logits))
    return token


def _argmax(row: Row) -> int:
    return int(row.argmax())


def _process(row: Row, params: SamplingParams, log: Sequence[int], prompt_len: int, allowed: bytes | None) -> Row:
    with np.errstate(over="ignore"):
        if needs_log(params):
            row = _penalised(row, params, np.asarray(log, dtype=np.int64), prompt_len)
        if allowed is not None:
            row = _keep(row, _allowed_tokens(allowed, len(row)))
            if row.max() == -np.inf:
                raise InvalidRequest("allowed: the model gives every allowed token the logit -inf; allow others")
        if params.temperature:
            row = _warped(row, params)
    return _checked(row)


def _penalised(row: Row, params: SamplingParams, log: NDArray[np.int64], prompt_len: int) -> Row:
    """Repetition: Keskar et al. 2019, over the whole log. Presence, frequency: the OpenAI API reference's formula,
    logit - count * frequency - (count > 0) * presence, over generated tokens. Tokens beyond the row have no logit."""
    row = row.copy()
    if params.repetition_penalty != 1.0:
        seen = _within(np.unique(log), len(row))
        penalty = np.float32(params.repetition_penalty)
        row[seen] = np.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    tokens, counts = np.unique(_within(log[prompt_len:], len(row)), return_counts=True)
    if params.frequency_penalty:
        row[tokens] -= counts.astype(np.float32) * np.float32(params.frequency_penalty)
    if params.presence_penalty:
        row[tokens] -= np.float32(params.presence_penalty)
    return row


def _within(tokens: NDArray[np.int64], vocab: int) -> NDArray[np.int64]:
    return tokens[tokens < vocab]


def _allowed_tokens(allowed: bytes, vocab: int) -> NDArray[np.bool_]:
    if len(allowed) != (vocab + 7) // 8:
        raise InvalidRequest(f"allowed has {len(allowed)} bytes; a vocabulary of {vocab} needs {(vocab + 7) // 8}")
    tokens = np.unpackbits(np.frombuffer(allowed, np.uint8), count=vocab, bitorder="little").view(np.bool_)
    if not tokens.any():
        raise InvalidRequest("allowed is empty: no token could follow; set the bit of at least one")
    return tokens


def _warped(row: Row, params: SamplingParams) -> Row:
    if params.temperature != 1.0:
        row = row / np.float32(params.temperature)
    if params.top_k:
        row = _top_k(row, params.top_k)
    if params.top_p < 1.0:
        row = _top_p(row, params.top_p)
    if params.min_p:
        row = _min_p(row, params.min_p)
    return row


def _top_k(row: Row, k: int) -> Row:
    """Keeps the k largest, and whatever equals the smallest of them."""
    if k >= len(row):
        return row
    least = np.partition(row, len(row) - k)[len(row) - k]
    return _keep(row, row >= least)


def _top_p(row: Row, p: float) -> Row:
    """Drops the least likely tokens whose probabilities add up to at most 1 - p, but never the last one."""
    ascending = np.sort(row)
    mass = torch.softmax(torch.from_numpy(ascending), -1).cumsum(-1).numpy()
    dropped = min(int(np.count_nonzero(mass <= np.float32(1 - p))), len(row) - 1)
    least = ascending[dropped]
    keep = row >= least
    equals_dropped = dropped - int(np.searchsorted(ascending, least))
    if equals_dropped:
        keep[np.flatnonzero(row == least)[:equals_dropped]] = False
    return _keep(row, keep)


def _min_p(row: Row, p: float) -> Row:
    """Drops tokens less likely than p times the likeliest."""
    probabilities = torch.softmax(torch.from_numpy(row), -1).numpy()
    return _keep(row, probabilities >= np.float32(p) * probabilities.max())


def _keep(row: Row, keep: NDArray[np.bool_]) -> Row:
    return np.where(keep, row, np.float32(-np.inf))


def _draw(scores: Row, u: float) -> int:
    """The inverse of the cumulative distribution at u, in float64, over tokens in ascending id order."""
    tokens = np.flatnonzero(scores > -np.inf)
    logits = scores[tokens]
    best = np.float64(logits.max())
    cumulative = np.empty(len(tokens))
    for start in range(0, len(tokens), EXP_BLOCK):
        block = slice(start, start + EXP_BLOCK)
        cumulative[block] = _exp(logits[block] - best)
    np.cumsum(cumulative, out=cumulative)
    return int(tokens[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


def _exp(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """e**x for x <= 0 within one unit in the last place, with additions, multiplications and rounding only: libraries'
    own exp differ between machines in the last bit, and a resumed answer must not."""
    r = np.maximum(x, EXP_ZERO_BELOW)
    k = np.rint(r * (1 / math.log(2)))
    r -= k * LN2_HIGH
    r -= k * LN2_LOW
    y = np.full_like(r, EXP_TAYLOR[0])
    for coefficient in EXP_TAYLOR[1:]:
        y *= r
        y += coefficient
    np.ldexp(y, k.astype(np.int32), out=y)
    y[x < EXP_ZERO_BELOW] = 0.0
    return y


def _log_softmax(row: Row) -> Row:
    logprobs: Row = torch.log_softmax(torch.from_numpy(row), -1).numpy()
    return logprobs


def _top(logprobs: Row, n: int) -> tuple[tuple[int, float], ...]:
    n = min(n, len(logprobs))
    if not n:
        return ()
    least = np.partition(logprobs, len(logprobs) - n)[len(logprobs) - n]
    candidates = np.flatnonzero(logprobs >= least)
    order = np.argsort(-logprobs[candidates], kind="stable")[:n]
    return tuple((int(token), float(logprobs[token])) for token in candidates[order])
