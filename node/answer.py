"""An answer on the terminal: text as it comes on stdout, or one JSON object when it is whole.

Law: stdout carries the answer and nothing else.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from protos import inference_pb2 as pb
from protos.errors import ShoalError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

REASONS: Final = {pb.Finished.STOP: "stop", pb.Finished.LENGTH: "length", pb.Finished.STOP_STRING: "stop_string"}


@dataclass(slots=True)
class Shown:
    """What was printed of an answer; it grows while it is."""

    started: pb.Started = field(default_factory=pb.Started)
    finished: pb.Finished = field(default_factory=pb.Finished)
    text: str = ""
    late: Counter[str] = field(default_factory=Counter)  # replies, by peer


def stream(
    events: Iterable[pb.GenerateEvent], tell: Callable[[str], None], *, as_ids: bool, shown: Shown | None = None
) -> Shown:
    """Writes the answer as it comes: its text, or its token ids (for a model without a tokenizer).

    `tell` hears its notices, those of late replies counted and at the end.  `shown`: where to find what was printed if
    this raises.
    """
    shown = Shown() if shown is None else shown
    try:
        for event in events:
            match event.WhichOneof("event"):
                case "started":
                    shown.started = event.started
                case "token":
                    text = f"{' ' if shown.text else ''}{event.token.id}" if as_ids else event.token.text
                    sys.stdout.write(text)
                    sys.stdout.flush()
                    shown.text += text
                case "finished":
                    shown.finished = event.finished
                case "notice" if event.notice.late:
                    shown.late[event.notice.peer_id] += 1
                case "notice":
                    _tell_within(shown.text, event.notice, tell)
    except (ShoalError, KeyboardInterrupt):
        if shown.text and not shown.text.endswith("\n"):  # what is said of it begins on a line of its own
            sys.stdout.write("\n")
            sys.stdout.flush()
        tell_late(shown.late, tell)
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    tell_late(shown.late, tell)
    return shown


def _tell_within(text: str, notice: pb.Notice, tell: Callable[[str], None]) -> None:
    """In the middle of an answer.  On a terminal the notice gets a line of its own; stdout never knows of it."""
    if text and not text.endswith("\n") and sys.stdout.isatty():
        tell("")
    tell(note(notice))


def note(notice: pb.Notice) -> str:
    """One line."""
    return f"note: {' '.join(notice.message.split())}"


def tell_late(late: Counter[str], tell: Callable[[str], None]) -> None:
    """A line for each peer whose replies were late: it is slow and has not failed, so nobody is told before the end."""
    for peer, count in late.items():
        times = "once" if count == 1 else f"{count} times"
        tell(f"note: peer {peer[:8]} was late {times}, and other holders of its experts were asked too")


def collect(events: Iterable[pb.GenerateEvent], tell: Callable[[str], None]) -> dict[str, Any]:
    """The whole answer as one JSON object; logprobs where they were asked for, notices where there are any."""
    started, finished, tokens, notices = pb.Started(), pb.Finished(), [], []
    late: Counter[str] = Counter()
    for event in events:
        match event.WhichOneof("event"):
            case "started":
                started = event.started
            case "token":
                tokens.append(event.token)
            case "finished":
                finished = event.finished
            case "notice":
                notices.append(_notice(event.notice))
                if event.notice.late:
                    late[event.notice.peer_id] += 1
                else:
                    tell(note(event.notice))
    tell_late(late, tell)
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
    if notices:
        answer["notices"] = notices
    return answer


def _notice(notice: pb.Notice) -> dict[str, Any]:
    return {
        "code": notice.code,
        "message": notice.message,
        "peer": notice.peer_id,
        "position": notice.position,
        "late": notice.late,
    }


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


def summary(shown: Shown) -> str:
    """One line on how it went."""
    started, finished = shown.started, shown.finished
    spent = timings(finished)
    speed = f", {spent['tokens_per_s']:.1f} tokens/s" if spent["tokens_per_s"] else ""
    return (
        f"{finished.generated} tokens after {started.prompt_tokens} of prompt{speed}, "
        f"first token after {spent['first_token_s']:.2f} s, ended by {REASONS[finished.reason]}"
    )


def cut_off(shown: Shown) -> str:
    """What to say of an answer that was not at its end; empty if it was."""
    if shown.finished.reason != pb.Finished.LENGTH:
        return ""
    return f"(cut off after {shown.finished.generated} tokens; --max-tokens allows more)"


def failure(error: ShoalError) -> dict[str, Any]:
    """An error as one JSON object."""
    return {"error": {"code": error.code, "message": error.message, "retry_after_s": error.retry_after_s}}


def write_json(value: object) -> None:
    """One line on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()
