"""What goes into the next forward: one row of every answer that runs, and prompts in chunks beside them.  Pure.

Law: every waiting feed of one row goes into each batch; longer feeds share what is left of `rows_max` evenly,
and at least one row of the oldest goes in, so that neither running answers nor prompts starve.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from protos.epoch import Epoch
    from protos.ids import SessionId


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """Log positions from `start`, of a feed that ends at `until`: token ids, and after the first stage rows [n, H].

    Later stages may go without the ids, except the last one, whose log must have them by then.

    A feed may come in several steps; the one that reaches `until` samples. `allowed` is a bitset over the vocabulary
    for the token that is sampled then.
    """

    session: SessionId
    epoch: Epoch
    start: int
    until: int
    tokens: tuple[int, ...] | None = None
    rows: torch.Tensor | None = None
    allowed: bytes | None = None

    @property
    def end(self) -> int:
        """The position after the step's last row."""
        count = self.rows.shape[0] if self.rows is not None else len(self.tokens or ())
        return self.start + count


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
    def ends_step(self) -> bool:
        return self.end == self.step.end

    @property
    def ends_feed(self) -> bool:
        return self.end == self.step.until


def plan(feeds: Sequence[tuple[Step, int]], rows_max: int) -> list[Chunk]:
    """The chunks of the next batch.  `feeds` are (step, next position), oldest first, one a session."""
    longer = [step.end - at for step, at in feeds if step.end - at > 1]
    shares = iter(share(longer, max(1, rows_max - (len(feeds) - len(longer)))))
    chunks = []
    for step, at in feeds:
        take = 1 if step.end - at == 1 else next(shares)
        if take:
            chunks.append(Chunk(step, at, at + take))
    return chunks


def share(wanted: Sequence[int], budget: int) -> list[int]:
    """Splits `budget` evenly over what is wanted, oldest first; what one does not need goes to the others.

    Max-min fairness: a short prompt behind a long one is through after few batches, and the long one is not held up by
    more than its share.
    """
    shares = [0] * len(wanted)
    while budget and (open_ := [i for i, want in enumerate(wanted) if shares[i] < want]):
        each = max(1, budget // len(open_))
        for i in open_[:budget]:
            more = min(each, wanted[i] - shares[i], budget)
            shares[i] += more
            budget -= more
    return shares
