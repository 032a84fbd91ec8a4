"""An answer on the terminal: text as it comes on stdout, or one JSON object when it is whole.

Law: stdout carries the answer and nothing else.
"""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Any, Final

from protos import inference_pb2 as pb
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Iterable

REASONS: Final = {pb.Finished.STOP: "stop", pb.Finished.LENGTH: "length", pb.Finished.STOP_STRING: "stop_string"}


def stream(events: Iterable[pb.GenerateEvent], *, as_ids: bool) -> tuple[pb.Started, pb.Finished]:
    """Writes the answer as it comes: its text, or its token ids (for a model without a tokenizer)."""
    started, finished = pb.Started(), pb.Finished()
    written = ""
    try:
        for event in events:
            match event.WhichOneof("event"):
                case "started":
                    started = event.started
                case "token":
                    text = f"{' ' if written else ''}{event.token.id}" if as_ids else event.token.text
                    sys.stdout.write(text)
                    sys.stdout.flush()
                    written = text or written
                case "finished":
                    finished = event.finished
    except (ShoalError, KeyboardInterrupt):
        if written and not written.endswith("\n"):  # what is said of it begins on a line of its own
            sys.stdout.write("\n")
            sys.stdout.flush()
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    return started, finished


def collect(events: Iterable[pb.GenerateEvent]) -> dict[str, Any]:
    """The whole answer as one JSON object; logprobs where they were asked for."""
    started, finished, tokens = pb.Started(), pb.Finished(), []
    for event in events:
        match event.WhichOneof("event"):
            case "started":
                started = event.started
            case "token":
                tokens.append(event.token)
            case "finished":
                finished = event.finished
    answer = {
        "model": started.model_id,
        "prompt_tokens": started.prompt_tokens,
        "token_ids": [token.id for token in tokens],
        "text": "".join(token.text for token in tokens),
        "finish_reason": REASONS[finished.reason],
        "timings": timings(finished),
    }
    if any(token.HasField("logprob") for token in tokens):
        answer["logprobs"] = [_logprobs(token) for token in tokens]
    if started.prompt_logprobs:
        answer["prompt_logprobs"] = [_finite(value) for value in started.prompt_logprobs]
    return answer


def _logprobs(token: pb.Token) -> dict[str, Any]:
    top = [{"id": entry.id, "text": entry.text, "logprob": _finite(entry.logprob)} for entry in token.top]
    return {"id": token.id, "logprob": _finite(token.logprob), "top": top}


def _finite(value: float) -> float | None:
    """None for -inf, a token that the model excludes: JSON has no infinity."""
    return value if math.isfinite(value) else None


def timings(finished: pb.Finished) -> dict[str, float | None]:
    """Seconds, and tokens a second after the first."""
    spent = finished.timings
    speed = (finished.generated - 1) / spent.decode_s if finished.generated > 1 and spent.decode_s > 0 else None
    return {
        "queue_s": spent.queue_s,
        "prefill_s": spent.prefill_s,
        "decode_s": spent.decode_s,
        "first_token_s": spent.queue_s + spent.prefill_s,
        "tokens_per_s": speed,
    }


def summary(started: pb.Started, finished: pb.Finished) -> str:
    """One line on how it went."""
    spent = timings(finished)
    speed = f", {spent['tokens_per_s']:.1f} tokens/s" if spent["tokens_per_s"] else ""
    return (
        f"{finished.generated} tokens after {started.prompt_tokens} of prompt{speed}, "
        f"first token after {spent['first_token_s']:.2f} s, ended by {REASONS[finished.reason]}"
    )


def failure(error: ShoalError) -> dict[str, Any]:
    """An error as one JSON object."""
    return {"error": {"code": error.code, "message": error.message, "retry_after_s": error.retry_after_s}}


def write_json(value: object) -> None:
    """One line on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()
