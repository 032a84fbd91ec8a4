"""The experts that are held here: a pure function of (unit, rows), whatever else is asked with them.
Law: pair (t, k) of the answer is expert index[t, k] over row t, to the bit as alone with its expert's other rows."""

import pytest
import torch
from tiny import model

from protos.errors import UnitMissing
from shard.anatomy import Anatomy
from shard.experts import ExpertBank, Pairs, feed_forward

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


def computed(held: ExpertBank, x: torch.Tensor, index: list[list[int]]) -> torch.Tensor:
    return held(LAYER, x, torch.tensor(index))


@torch.inference_mode()
def test_pairs_come_back_in_the_order_they_were_asked_in(anatomy: Anatomy) -> None:
    index = [[1, 3], [0, 1], [1, 0]]
    x, kernel, weights = hidden(anatomy, 3), anatomy.experts[LAYER][1], anatomy.tensors()
    out = computed(bank(anatomy, range(4)), x, index)
    for expert in (0, 1, 3):
        pairs = [(t, row.index(expert)) for t, row in enumerate(index) if expert in row]
        alone = feed_forward(kernel, weights[f"expert.{LAYER}.{expert}"], x[[t for t, _ in pairs]])
        assert torch.equal(torch.stack([out[t, k] for t, k in pairs]), alone)


@torch.inference_mode()
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("holders", [2, 3])
def test_what_several_holders_compute_is_to_the_bit_what_one_computes(
    anatomy: Anatomy, rows: int, holders: int
) -> None:
    x = hidden(anatomy, rows)
    chance = torch.Generator().manual_seed(rows)
    index = torch.stack([torch.randperm(8, generator=chance)[:3] for _ in range(rows)])
    pairs, parts = Pairs(index), []
    for holder in reversed(range(holders)):
        mine = [expert for expert in reversed(pairs.experts) if expert % holders == holder]
        part = pairs.part(mine)
        held = bank(anatomy, range(8))
        parts.append((part, held.rows(LAYER, x, part)))
    assert torch.equal(pairs.join(parts, x), bank(anatomy, range(8))(LAYER, x, index))


def test_the_rows_that_go_to_an_expert_are_known() -> None:
    pairs = Pairs(torch.tensor([[1, 3], [0, 1], [2, 0]]))
    assert pairs.rows_of([1]) == [0, 1]
    assert pairs.rows_of([0, 3]) == [0, 1, 2]
    assert [pairs.count(expert) for expert in (0, 1, 2, 3)] == [2, 2, 1, 1]


@torch.inference_mode()
def test_an_expert_that_one_row_names_twice_is_computed_for_both(anatomy: Anatomy) -> None:
    x = hidden(anatomy, 1)
    out = computed(bank(anatomy, range(2)), x, [[1, 1, 0]])
    assert torch.equal(out[0, 0], out[0, 1])


@torch.inference_mode()
def test_rows_that_were_sent_are_not_changed(anatomy: Anatomy) -> None:
    x = hidden(anatomy, 1)
    before = x.clone()
    computed(bank(anatomy, range(1)), x, [[0]])
    assert torch.equal(x, before)


def test_no_pairs_give_no_rows(anatomy: Anatomy) -> None:
    x = hidden(anatomy, 2)
    part = Pairs(torch.tensor([[0], [1]])).part([])
    assert bank(anatomy, range(1)).rows(LAYER, x, part).shape == (0, x.shape[1])


def test_an_expert_that_is_not_held_is_missing_by_name(anatomy: Anatomy) -> None:
    with pytest.raises(UnitMissing, match=f"expert.{LAYER}.2"):
        computed(bank(anatomy, range(2)), hidden(anatomy, 1), [[1, 2]])
    with pytest.raises(UnitMissing, match="layer 0"):
        bank(anatomy, range(2))(0, hidden(anatomy, 1), torch.tensor([[0]]))
