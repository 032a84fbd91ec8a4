"""What goes into the next forward: one row of every answer that runs, and prompts in chunks beside them.  Pure.

Law: every waiting feed of one row goes into each batch; longer feeds share what is left of `rows_max`, oldest first, and
at least one row of the oldest goes in, so that neither running answers nor prompts starve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from protos.ids import SessionId


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One feed of a session: log positions [start, until) as token ids (first stage) or as rows [n, H] (later ones).

    `allowed` is a bitset over the vocabulary for the token that this step samples.
    """

    session: SessionId
    epoch: int
    start: int
    until: int
    tokens: tuple[int, ...] | None = None
    rows: torch.Tensor | None = None
    allowed: bytes | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Positions [start, end) of a step."""

    step: Step
    start: int
    end: int

    @property
    def rows(self) -> int:
        return self.end - self.start

    @property
    def is_final(self) -> bool:
        return self.end == self.step.until


def plan(feeds: Sequence[tuple[Step, int]], rows_max: int) -> list[Chunk]:
    """The chunks of the next batch.  `feeds` are (step, next position), oldest first, one a session."""
    budget = max(1, rows_max - sum(1 for step, at in feeds if step.until - at == 1))
    chunks = []
    for step, at in feeds:
        left = step.until - at
        take = left if left == 1 else min(left, budget)
        if left > 1:
            budget -= take
        if take:
            chunks.append(Chunk(step, at, at + take))
    return chunks
