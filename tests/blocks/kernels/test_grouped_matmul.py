"""Sorting tokens by expert and multiplying each group by its matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from blockwright.blocks.kernels.grouped_matmul import (
    Order,
    _AddUp,
    add_up,
    combine,
    dispatch,
    grouped_matmul,
    grouped_matmul_reference,
    sort_by_expert,
    sum_in_order,
    take,
)

COUNTS = {
    "uneven": [5, 1, 9, 2],
    "first has none": [0, 3, 4, 1],
    "last has none": [3, 4, 1, 0],
    "middle ones have none": [3, 0, 0, 5],
    "one has all": [0, 0, 7, 0],
}


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def by_hand(rows: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
    """Row by row: the oracle that shares nothing with either path."""
    expert = [e for e, n in enumerate(counts) for _ in range(n)]
    return torch.stack([weight[e] @ row for e, row in zip(expert, rows, strict=True)])


@pytest.mark.parametrize(
    ("load", "size", "precision"),
    pairs(
        list(COUNTS),
        [(16, 8), (8, 24), (7, 5), (16, 5), (5, 16)],
        [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
    ),
)
def test_product_and_its_gradients_equal_row_by_row(
    load: str, size: tuple[int, int], precision: tuple[torch.dtype, float]
) -> None:
    (K, N), (dtype, tolerance) = size, precision
    counts = COUNTS[load]
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), K, dtype=dtype, requires_grad=True)
    weight = (torch.randn(len(counts), N, K, dtype=dtype) / K**0.5).requires_grad_()
    y = grouped_matmul(rows, weight, ends(counts))
    assert y.dtype == dtype and y.shape == (sum(counts), N)
    wide = [x.detach().double().requires_grad_() for x in (rows, weight)]
    expected = by_hand(*wide, counts)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
    cotangent = torch.randn_like(y)
    for got, right in zip(
        torch.autograd.grad(y, (rows, weight), cotangent),
        torch.autograd.grad(expected, wide, cotangent.double()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), right, rtol=tolerance, atol=5 * tolerance)


@pytest.mark.parametrize("load", COUNTS)
def test_expert_without_tokens_gets_a_gradient_of_zero(load: str) -> None:
    counts = COUNTS[load]
    weight = torch.randn(4, 8, 16, requires_grad=True)
    for _ in range(3):  # former contents of the memory must not show
        spoilt = [torch.full((4, 8, 16), float("nan")) for _ in range(8)]
        del spoilt
        y = grouped_matmul(torch.randn(sum(counts), 16), weight, ends(counts))
        (grad,) = torch.autograd.grad(y, weight, torch.randn_like(y))
        for e, n in enumerate(counts):
            assert (grad[e] == 0).all() if n == 0 else (grad[e] != 0).any()


def test_reference_passes_gradcheck() -> None:
    torch.manual_seed(0)
    rows, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (3, 2, 3)))
    assert gradcheck(lambda r, w: grouped_matmul_reference(r, w, ends([2, 0, 4])), (rows, weight))


@pytest.mark.parametrize("width", [16, 7], ids=["aligned", "unaligned"])
def test_autocast_lowers_the_product_as_it_does_for_a_dense_layer(width: int) -> None:
    rows, weight = torch.randn(6, width), torch.randn(2, 8, width, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_matmul(rows, weight, ends([2, 4]))
        assert y.dtype == (rows @ weight[0].t()).dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y, weight, torch.randn_like(y))
    assert grad.dtype == torch.float32


def test_meta_device_knows_shape_and_flops_without_counts() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = grouped_matmul(torch.empty(10, 16), torch.empty(4, 8, 16), torch.empty(4, dtype=torch.int32))
    assert y.shape == (10, 8) and y.is_meta
    assert counter.get_total_flops() == 2 * 10 * 16 * 8


# --- dispatch and combine ---------------------------------------------------------------------------------------------


def some_order() -> Order:
    return sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]]), 5)


def test_order_sorts_by_expert_and_ties_keep_the_order_of_tokens() -> None:
    order = some_order()
    assert order.sorted.tolist() == [1, 2, 6, 0, 4, 7, 3, 5]
    assert order.ends.tolist() == [3, 3, 6, 8, 8] and order.ends.dtype == torch.int32
    assert order.place[order.sorted].tolist() == list(range(8))


def test_dispatch_copies_each_token_to_its_experts_and_combine_sums_what_comes_back() -> None:
    x = torch.arange(4.0)[:, None].expand(4, 3).contiguous()
    rows = dispatch(x, some_order())
    assert rows[:, 0].tolist() == [0, 1, 3, 0, 2, 3, 1, 2]
    assert torch.equal(combine(rows, some_order()), 2 * x)


def test_dispatch_and_combine_are_each_others_adjoint() -> None:
    order = some_order()
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    torch.testing.assert_close((dispatch(x, order) * y).sum(), (x * combine(y, order)).sum(), rtol=0, atol=1e-12)
    x.requires_grad_()
    y.requires_grad_()
    assert gradcheck(lambda x: dispatch(x, order), x)
    assert gradcheck(lambda y: combine(y, order), y)
    (to_x,) = torch.autograd.grad(dispatch(x, order), x, y.detach())
    assert torch.equal(to_x, combine(y, order))
    (to_y,) = torch.autograd.grad(combine(y, order), y, x.detach())
    assert torch.equal(to_y, dispatch(x, order))


def test_single_choice_is_a_permutation() -> None:
    order = sort_by_expert(torch.tensor([[1], [0], [1]]), 2)
    x = torch.randn(3, 2)
    assert torch.equal(dispatch(x, order), x[[1, 0, 2]])
    assert torch.equal(combine(dispatch(x, order), order), x)


def test_pairs_without_an_expert_are_left_out_in_both_directions() -> None:
    experts = torch.tensor([[2, 5], [5, 5], [2, 3], [0, 5]])  # 5 is no expert
    order = sort_by_expert(experts, 5, pairs=4)
    assert order.sorted.tolist() == [6, 0, 4, 5] and order.ends.tolist() == [1, 1, 3, 4, 4]
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(dispatch(x, order), x[[3, 0, 2, 2]])
    assert torch.equal(combine(y, order), torch.stack([y[1], torch.zeros(3), y[2] + y[3], y[0]]))
    torch.testing.assert_close((dispatch(x, order) * y).sum(), (x * combine(y, order)).sum(), rtol=0, atol=1e-12)
    assert gradcheck(lambda x: dispatch(x, order), x.requires_grad_())
    assert gradcheck(lambda y: combine(y, order), y.requires_grad_())


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 8), (torch.float32, 7), (torch.bfloat16, 7)])
def test_compiled_grouped_matmul_has_no_graph_break_and_the_same_gradients(dtype: torch.dtype, width: int) -> None:
    ends = torch.tensor([3, 3, 9, 10], dtype=torch.int32)  # one expert gets nothing

    def run(product: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        rows, weight, grad = (
            torch.randn(n, generator=generator).to(dtype) for n in ((10, width), (4, 5, width), (10, 5))
        )
        rows.requires_grad_(), weight.requires_grad_()
        y = product(rows, weight, ends)
        return [y, *torch.autograd.grad(y, (rows, weight), grad)]

    torch._dynamo.reset()
    compiled = run(torch.compile(grouped_matmul, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, run(grouped_matmul_reference), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_rows_are_added_in_one_order_and_in_fp32_where_index_add_would_use_atomics() -> None:
    generator = torch.Generator().manual_seed(0)
    token = torch.randint(7, (40,), generator=generator)
    token[token == 3] = 2  # a token without rows
    rows = torch.randn(40, 5, generator=generator).to(torch.bfloat16)
    exact = torch.zeros(7, 5, dtype=torch.float64).index_add(0, token, rows.double())
    found = sum_in_order(rows, token, 7)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.to(torch.bfloat16))


def test_taking_and_adding_up_are_each_others_adjoint() -> None:
    token = torch.tensor([2, 0, 2, 2, 1])
    x, rows, g, h = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (4, 5, 5, 4))
    (to_x,) = torch.autograd.grad(take(x, token), x, g)
    torch.testing.assert_close(to_x, add_up(g, token, 4))
    (to_rows,) = torch.autograd.grad(_AddUp.apply(rows, token, 4), rows, h)
    torch.testing.assert_close(to_rows, take(h, token))


def test_no_sum_on_a_gpu_goes_by_atomics() -> None:
    ran: list[str] = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func.name())
            return func(*args, **(kwargs or {}))

    with FakeTensorMode(), Operators(), torch.no_grad():
        rows, token = torch.empty(5, 3, device="cuda"), torch.empty(5, dtype=torch.int64, device="cuda")
        assert add_up(rows, token, 4).shape == (4, 3)
    assert "aten::segment_reduce" in ran and not any("index_add" in name for name in ran)
