"""The experts that are held here: a pure function of (unit, rows), whatever else is asked with them.
Law: pair p of the answer is expert[p] over row[p], to the bit as alone with its expert's other rows."""

import pytest
import torch
from tiny import model

from protos.errors import UnitMissing
from shard.anatomy import Anatomy
from shard.experts import ExpertBank, feed_forward

LAYER = 1


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def anatomy(request: pytest.FixtureRequest) -> Anatomy:
    return Anatomy(model(request.param, "float32"))


def bank(anatomy: Anatomy, experts: range) -> ExpertBank:
    held = ExpertBank()
    weights = anatomy.tensors()
    held.add_layer(LAYER, anatomy.experts[LAYER][1])
    for expert in experts:
        held.add(LAYER, expert, weights[f"expert.{LAYER}.{expert}"])
    return held


def hidden(anatomy: Anatomy, rows: int) -> torch.Tensor:
    width = anatomy.model.config.hidden_size
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


@torch.inference_mode()
def test_pairs_come_back_in_the_order_they_were_asked_in(anatomy: Anatomy) -> None:
    rows, experts = [0, 2, 1, 0, 2, 1], [1, 0, 1, 3, 1, 0]
    x, kernel, weights = hidden(anatomy, 3), anatomy.experts[LAYER][1], anatomy.tensors()
    out = bank(anatomy, range(4)).rows(LAYER, x, rows, experts)
    for expert in set(experts):
        pairs = [pair for pair, chosen in enumerate(experts) if chosen == expert]
        alone = feed_forward(kernel, weights[f"expert.{LAYER}.{expert}"], x[[rows[pair] for pair in pairs]])
        assert torch.equal(out[pairs], alone)


@torch.inference_mode()
def test_rows_that_were_sent_are_not_changed(anatomy: Anatomy) -> None:
    x = hidden(anatomy, 1)
    before = x.clone()
    bank(anatomy, range(1)).rows(LAYER, x, [0], [0])
    assert torch.equal(x, before)


def test_no_pairs_give_no_rows(anatomy: Anatomy) -> None:
    x = hidden(anatomy, 2)
    assert bank(anatomy, range(1)).rows(LAYER, x, [], []).shape == (0, x.shape[1])


def test_an_expert_that_is_not_held_is_missing_by_name(anatomy: Anatomy) -> None:
    with pytest.raises(UnitMissing, match=f"expert.{LAYER}.2"):
        bank(anatomy, range(2)).rows(LAYER, hidden(anatomy, 1), [0, 0], [1, 2])
