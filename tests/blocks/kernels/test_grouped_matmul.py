"""Sorting tokens by expert and multiplying each group by its matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from blockwright.blocks.experts import SwiGLUExperts
from blockwright.blocks.kernels.grouped_matmul import (
    _AddUp,
    add_up,
    aligned,
    combine,
    dispatch,
    grouped_matmul,
    grouped_matmul_reference,
    sort_by_expert,
    sum_in_order,
    take,
)
from tests.blocks.kernels.compared import assert_compiles, assert_same, drawn, leaves

COUNTS = [[5, 1, 9, 2], [0, 3, 4, 1], [3, 4, 1, 0], [3, 0, 0, 5], [0, 0, 7, 0]]


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def test_product_and_its_gradients_equal_row_by_row() -> None:
    precisions = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
    for counts, (K, N), (dtype, tolerance) in pairs(COUNTS, [(16, 8), (8, 24), (7, 5), (16, 5), (5, 16)], precisions):

        def by_hand(rows: Tensor, weight: Tensor, counts: list[int] = counts) -> Tensor:
            """The oracle that shares nothing with either path."""
            expert = [e for e, n in enumerate(counts) for _ in range(n)]
            return torch.stack([weight[e] @ row for e, row in zip(expert, rows, strict=True)])

        rows, weight = leaves((sum(counts), K), (len(counts), N, K), dtype=dtype)
        given = [rows, (weight / K**0.5).detach().requires_grad_()]
        assert_same(lambda *t, c=counts: grouped_matmul(*t, ends(c)), by_hand, given, tolerance, slack=5)


def test_odd_widths_are_padded_to_what_torch_takes_on_a_gpu_where_the_host_then_never_waits() -> None:
    rows, weight = leaves((17, 7), (4, 5, 7), dtype=torch.float32)
    padded, wider = aligned(rows, weight)
    assert (padded.shape[1], *wider.shape[1:]) == (8, 8, 8)
    counts = ends([5, 1, 9, 2])
    assert_same(
        lambda r, w: grouped_matmul(*aligned(r, w), counts)[:, :5],
        lambda r, w: grouped_matmul_reference(r, w, counts),
        [rows, weight],
        1e-5,
    )
    with FakeTensorMode(), torch.no_grad():  # a number that is read raises
        rows, weight = (torch.empty(n, dtype=torch.bfloat16, device="cuda") for n in ((17, 7), (4, 5, 7)))
        assert grouped_matmul(rows, weight, torch.empty(4, dtype=torch.int32, device="cuda")).shape == (17, 5)


@pytest.mark.parametrize("counts", COUNTS)
def test_expert_without_tokens_gets_a_gradient_of_zero_whatever_was_in_that_memory(counts: list[int]) -> None:
    for _ in range(3):
        spoilt = [torch.full((4, 8, 16), float("nan")) for _ in range(8)]
        del spoilt
        rows, weight = leaves((sum(counts), 16), (4, 8, 16), dtype=torch.float32)
        y = grouped_matmul(rows, weight, ends(counts))
        grads = torch.autograd.grad(y, weight, drawn(*y.shape, dtype=torch.float32))
        for grad in grads:
            assert [bool((grad[e] != 0).any()) for e in range(4)] == [n > 0 for n in counts] and grad.isfinite().all()


def test_a_gradient_that_is_expanded_is_taken_as_any() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        rows, weight = leaves((6, 16), (2, 8, 16), dtype=dtype)
        found = torch.autograd.grad(grouped_matmul(rows, weight, ends([2, 4])).sum(), (rows, weight))
        right = torch.autograd.grad(grouped_matmul_reference(rows, weight, ends([2, 4])).sum(), (rows, weight))
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("width", [16, 7], ids=["aligned", "unaligned"])
def test_autocast_lowers_the_product_as_it_does_for_a_dense_layer(width: int) -> None:
    rows, weight = drawn(6, width).float(), drawn(2, 8, width).float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_matmul(rows, weight, ends([2, 4]))
        assert y.dtype == (rows @ weight[0].t()).dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(y, weight, torch.randn_like(y))
    assert grad.dtype == torch.float32


def test_meta_device_knows_shape_and_flops_without_counts() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        y = grouped_matmul(torch.empty(10, 16), torch.empty(4, 8, 16), torch.empty(4, dtype=torch.int32))
    assert y.shape == (10, 8) and y.is_meta and counter.get_total_flops() == 2 * 10 * 16 * 8


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 8), (torch.bfloat16, 7)])
def test_compiled_grouped_matmul_has_no_graph_break_and_the_same_gradients(dtype: torch.dtype, width: int) -> None:
    stops = torch.tensor([3, 3, 9, 10], dtype=torch.int32)  # one expert gets nothing
    given, bound = leaves((10, width), (4, 5, width), dtype=dtype), 1e-5 if dtype == torch.float32 else 0.05
    assert_compiles(lambda *t: grouped_matmul(*t, stops), given, bound)
    assert_same(lambda *t: grouped_matmul(*t, stops), lambda *t: grouped_matmul_reference(*t, stops), given, bound)


# --- dispatch and combine ---------------------------------------------------------------------------------------------

ORDERS = {
    "all": sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 3], [0, 2]]), 5),
    "some": sort_by_expert(torch.tensor([[2, 5], [5, 5], [2, 3], [0, 5]]), 5, pairs=4),  # 5 is no expert
    "one each": sort_by_expert(torch.tensor([[1], [0], [1]]), 2),
}


def test_order_sorts_by_expert_ties_keep_the_order_of_tokens_and_pairs_without_an_expert_are_left_out() -> None:
    order, some = ORDERS["all"], ORDERS["some"]
    assert order.sorted.tolist() == [1, 2, 6, 0, 4, 7, 3, 5] and order.place[order.sorted].tolist() == list(range(8))
    assert order.ends.tolist() == [3, 3, 6, 8, 8] and order.ends.dtype == torch.int32
    assert some.sorted.tolist() == [6, 0, 4, 5] and some.ends.tolist() == [1, 1, 3, 4, 4]
    x, y = drawn(4, 3), drawn(4, 3, seed=1)
    assert torch.equal(dispatch(x, order), x[[0, 1, 3, 0, 2, 3, 1, 2]])
    assert torch.equal(combine(dispatch(x, order), order), 2 * x)
    assert torch.equal(dispatch(x, some), x[[3, 0, 2, 2]])
    assert torch.equal(combine(y, some), torch.stack([y[1], torch.zeros(3), y[2] + y[3], y[0]]))
    assert torch.equal(dispatch(x[:3], ORDERS["one each"]), x[[1, 0, 2]])


@pytest.mark.parametrize("name", ORDERS)
def test_dispatch_and_combine_are_each_others_adjoint(name: str) -> None:
    order = ORDERS[name]
    x, y = leaves((order.n_tokens, 3), (len(order.sorted), 3))
    assert gradcheck(lambda x: dispatch(x, order), x) and gradcheck(lambda y: combine(y, order), y)
    torch.testing.assert_close((dispatch(x, order) * y).sum(), (x * combine(y, order)).sum(), rtol=0, atol=1e-12)
    (to_x,) = torch.autograd.grad(dispatch(x, order), x, y.detach())
    (to_y,) = torch.autograd.grad(combine(y, order), y, x.detach())
    assert torch.equal(to_x, combine(y, order)) and torch.equal(to_y, dispatch(x, order))


def test_rows_are_added_in_one_order_and_in_fp32_where_index_add_would_use_atomics() -> None:
    token = torch.randint(7, (40,), generator=torch.Generator().manual_seed(0))
    token[token == 3] = 2  # a token without rows
    rows = drawn(40, 5).to(torch.bfloat16)
    exact = torch.zeros(7, 5, dtype=torch.float64).index_add(0, token, rows.double())
    found = sum_in_order(rows, token, 7)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.to(torch.bfloat16))


def test_taking_and_adding_up_are_each_others_adjoint() -> None:
    token = torch.tensor([2, 0, 2, 2, 1])
    x, rows, g, h = leaves((4, 3), (5, 3), (5, 3), (4, 3))
    (to_x,) = torch.autograd.grad(take(x, token), x, g)
    (to_rows,) = torch.autograd.grad(_AddUp.apply(rows, token, 4), rows, h)
    torch.testing.assert_close((to_x, to_rows), (add_up(g, token, 4), take(h, token)))


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


# --- a few tokens -----------------------------------------------------------------------------------------------------

E = 6


def experts(dtype: torch.dtype) -> SwiGLUExperts:
    block = SwiGLUExperts(16, E, 8)
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.copy_(drawn(*p.shape, seed=i))
    return block.to(dtype)
