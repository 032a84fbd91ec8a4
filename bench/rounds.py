"""Measuring on a machine that is not quiet: every way has its turn in each round, and what counts is the median round.

Law: ways that are compared run one after the other in the same round, so that what disturbs one disturbs its rival too.
"""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Result = TypeVar("Result")


def interleaved(ways: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each way gave in each round, in order."""
    found: dict[str, list[Result]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            found[name].append(run())
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Ratio of the medians, and the least and the greatest ratio of a round."""
    of_rounds = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{median(ours) / median(theirs):.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown; columns of numbers, which are all but the first, on the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def conditions(threads: int = 0) -> str:
    """What the figures hold for, in one line; without `threads`, the node had what it takes by itself."""
    chosen = f"{threads} torch thread{'s' * (threads != 1)}" if threads else f"{os.cpu_count()} cores"
    return (
        f"{_processor()}; {chosen}; torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )


def _processor() -> str:
    """The name that Linux gives it, with what it computes bfloat16 with; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    extensions = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return f"{facts.get('model name', platform.machine())} ({', '.join(extensions)})"
