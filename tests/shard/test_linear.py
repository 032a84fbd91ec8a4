"""Whatever kernel multiplies: the product is torch's, in float32 within its rounding, elsewhere to the bit."""

from itertools import product

import pytest
import torch
from torch.nn import functional

from shard import linear as kernels
from shard.linear import BATCHED_ROWS, BATCHED_WIDTH_MAX, ONEDNN_BYTES_MIN, ONEDNN_ROWS_MIN, linear, speed_up

TOLERANCE = 1e-4

# (width, columns): a small matrix, one at oneDNN's size, one below it, one wider than the batched kernel takes
SIZES = [
    (32, 48),
    (256, ONEDNN_BYTES_MIN // 1024),
    (256, ONEDNN_BYTES_MIN // 1024 - 1),
    (BATCHED_WIDTH_MAX, 40),
    (BATCHED_WIDTH_MAX + 1, 80),
    (BATCHED_WIDTH_MAX + 1, 8),
]
ROWS = [1, *BATCHED_ROWS, BATCHED_ROWS.stop, ONEDNN_ROWS_MIN - 1, ONEDNN_ROWS_MIN, 70]


def operands(
    rows: int, width: int, columns: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 7919 + width)
    x = torch.randn((rows, width), generator=generator)
    weight = torch.randn((columns, width), generator=generator) / width**0.5
    return x.to(dtype), weight.to(dtype), torch.randn(columns, generator=generator).to(dtype)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("width", "columns"), SIZES)
def test_every_kernel_gives_torch_s_product_within_rounding(width: int, columns: int, with_bias: bool) -> None:
    for rows in ROWS:
        x, weight, bias = operands(rows, width, columns)
        given = bias if with_bias else None
        expected = functional.linear(x.double(), weight.double(), given if given is None else given.double()).float()
        assert_close(linear(x, weight, given), expected)


@pytest.mark.parametrize("shape", [(1, 3), (1, 40), (2, 2), (1, 1, 1), (), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("columns", [48, 1024])
def test_all_axes_before_the_last_are_rows_and_stay(shape: tuple[int, ...], columns: int) -> None:
    x, weight, _ = operands(torch.Size(shape).numel(), 256, columns)
    folded = x.view(*shape, 256)
    assert linear(folded, weight).shape == (*shape, columns)
    assert_close(linear(folded, weight), functional.linear(folded, weight))


@pytest.mark.parametrize("shape", [(0, 256), (1, 0, 256), (0, 4, 256)], ids=str)
@pytest.mark.parametrize("columns", [48, 1024])
@pytest.mark.parametrize("with_bias", [False, True])
def test_no_rows_give_no_rows(shape: tuple[int, ...], columns: int, with_bias: bool) -> None:
    weight, bias = torch.zeros((columns, 256)), torch.zeros(columns)
    assert linear(torch.zeros(shape), weight, bias if with_bias else None).shape == (*shape[:-1], columns)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_in_other_dtypes_it_is_torch_s_own_to_the_bit(dtype: torch.dtype, with_bias: bool) -> None:
    for (width, columns), rows in product(SIZES, ROWS):
        x, weight, bias = operands(rows, width, columns, dtype)
        given = bias if with_bias else None
        assert torch.equal(linear(x, weight, given), functional.linear(x, weight, given))


def test_views_that_are_not_contiguous_are_multiplied_as_their_copies() -> None:
    for rows, columns in product((1, 3, 40), (48, 1024)):
        x, weight, _ = operands(rows, 256, columns)
        strided = torch.stack([x, x], dim=-1)[..., 0]
        assert not strided.is_contiguous()
        assert_close(linear(strided, weight), functional.linear(x, weight))
        turned = weight.t().contiguous().t()
        assert_close(linear(x, turned), functional.linear(x, weight))


def test_rows_leave_in_rows() -> None:
    for rows in ROWS:
        x, weight, _ = operands(rows, 256, 48)
        assert linear(x, weight).is_contiguous()


def test_a_torch_without_onednn_multiplies_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ONEDNN", False)
    for (width, columns), rows in product(SIZES, ROWS):
        x, weight, _ = operands(rows, width, columns)
        assert torch.equal(linear(x, weight), functional.linear(x, weight))


def test_each_limit_changes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could pass without having reached any branch but one."""
    if not kernels._ONEDNN:
        pytest.skip("THIS TORCH HAS NO ONEDNN: its kernels were not tested")
    used: list[str] = []
    bmm, plain = torch.bmm, functional.linear

    def noted_bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        used.append("batched")
        return bmm(a, b)

    def noted_plain(*arguments: torch.Tensor) -> torch.Tensor:
        used.append("plain")
        return plain(*arguments)

    monkeypatch.setattr(torch, "bmm", noted_bmm)
    monkeypatch.setattr(functional, "linear", noted_plain)

    def kernel(rows: int, width: int, columns: int, with_bias: bool = False) -> str:
        x, weight, bias = operands(rows, width, columns)
        used.clear()
        linear(x, weight, bias if with_bias else None)
        return used[0] if used else "onednn"

    large, small = ONEDNN_BYTES_MIN // 1024, ONEDNN_BYTES_MIN // 1024 - 1
    assert [kernel(rows, 256, small) for rows in (1, 2, 4, 5, ONEDNN_ROWS_MIN - 1, ONEDNN_ROWS_MIN)] == [
        *("plain", "batched", "batched", "plain", "plain", "onednn")
    ]
    assert [kernel(rows, 256, large) for rows in (1, 2, 4, 5)] == ["onednn", "batched", "batched", "onednn"]
    assert [kernel(2, 256, columns, with_bias=True) for columns in (small, large)] == ["plain", "onednn"]
    assert [kernel(2, width, 8) for width in (BATCHED_WIDTH_MAX, BATCHED_WIDTH_MAX + 1)] == ["batched", "plain"]


def test_all_linear_layers_of_a_model_go_through_it_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.nn.Linear):
        pass

    net = torch.nn.Sequential(
        torch.nn.Linear(8, 4), torch.nn.ModuleList([torch.nn.Linear(4, 4, bias=False)])[0], Own(4, 2)
    )
    x = torch.randn((3, 8), generator=torch.Generator().manual_seed(0))
    expected = net(x)
    speed_up(net)
    calls = []
    inner = kernels.linear
    monkeypatch.setattr(kernels, "linear", lambda *arguments: (calls.append(arguments[1].shape), inner(*arguments))[1])
    with torch.inference_mode():
        assert_close(net(x), expected)
    assert calls == [(4, 8), (4, 4)]
