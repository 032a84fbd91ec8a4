"""Attention by hand, where torch has no kernel for it."""

import pytest
import torch

from shard import attention


def test_scores_are_made_in_blocks_of_so_many_and_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 8, generator=chance) for heads in (4, 2, 2))
    sinks = torch.randn(4, generator=chance)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    whole = attention.attend_with_sinks(query, key, value, mask, 0.3, sinks)
    made: list[int] = []
    block = attention._block_with_sinks

    def counting(rows: torch.Tensor, *rest: object) -> torch.Tensor:
        made.append(rows.shape[1] * rows.shape[2] * key.shape[2])
        return block(rows, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "_block_with_sinks", counting)
    monkeypatch.setattr(attention, "SCORES_MAX", 2 * 4 * 5)
    torch.testing.assert_close(attention.attend_with_sinks(query, key, value, mask, 0.3, sinks), whole)
    assert made == [40, 40, 20]
