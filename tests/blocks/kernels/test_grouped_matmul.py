"""Sorting tokens by expert and multiplying each group by its matrix: product by product, and in one pass."""

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
from blockwright.blocks.gating.base import Routing, count
from blockwright.blocks.kernels import experts as experts_module
from blockwright.blocks.kernels import grouped_swiglu as module
from blockwright.blocks.kernels.few_experts import FEW, few
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
from blockwright.blocks.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_reference
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


@pytest.mark.parametrize("counts", COUNTS)
def test_expert_without_tokens_gets_a_gradient_of_zero_whatever_was_in_that_memory(counts: list[int]) -> None:
    order = sort_by_expert(torch.tensor([[e] for e, n in enumerate(counts) for _ in range(n)]), 4)
    for _ in range(3):
        spoilt = [torch.full((4, 8, 16), float("nan")) for _ in range(8)]
        del spoilt
        rows, weight, gate_up, down = leaves((sum(counts), 16), (4, 8, 16), (4, 8, 16), (4, 16, 4), dtype=torch.float32)
        y = grouped_matmul(rows, weight, ends(counts))
        grads = torch.autograd.grad(y, weight, drawn(*y.shape, dtype=torch.float32))
        y = grouped_swiglu(rows, torch.ones(sum(counts)), gate_up, down, order)
        for grad in (*grads, *torch.autograd.grad(y.sum(), (gate_up, down))):
            assert [bool((grad[e] != 0).any()) for e in range(4)] == [n > 0 for n in counts] and grad.isfinite().all()


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


# --- the experts' one pass --------------------------------------------------------------------------------------------

CHOICES = {
    "two of five": (torch.randint(0, 5, (23, 2), generator=torch.Generator().manual_seed(0)), None),
    "one each": (torch.tensor([[3], [1], [3], [0]]), None),
    "all to one": (torch.full((9, 2), 4), None),
    "all to none": (torch.full((3, 2), 5), 0),
    "some to none": (torch.tensor([[2, 5], [5, 5], [2, 3], [0, 5]]), 4),  # 5 is no expert
}
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)]


def order_of(choices: str) -> Order:
    experts, pairs = CHOICES[choices]
    return sort_by_expert(experts, 5, pairs)


def inputs(choices: str, dtype: torch.dtype, D: int = 7, F: int = 3) -> list[Tensor]:
    rows, T = len(order_of(choices).sorted), len(CHOICES[choices][0])
    shapes = ((T, D), (rows,), (5, 2 * F, D), (5, D, F))
    return [(0.7 * drawn(*s, seed=i)).to(dtype).requires_grad_() for i, s in enumerate(shapes)]


def test_one_pass_and_its_gradients_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for choices, rows, short, rounded in pairs(list(CHOICES), [1024, 4], [256, 0], [False, True]):
        monkeypatch.setattr(module, "ROWS", rows)
        monkeypatch.setattr(module, "SHORT", short)
        monkeypatch.setattr(module, "multiplies_by_onednn", lambda dtype, rounded=rounded: rounded)
        order = order_of(choices)
        for dtype, tolerance in PRECISIONS:
            call, plain = (lambda *t, f=f, o=order: f(*t, o) for f in (grouped_swiglu, grouped_swiglu_reference))
            assert_same(call, plain, inputs(choices, dtype), tolerance, rtol=tolerance)
    assert gradcheck(lambda *t: grouped_swiglu(*t, order), inputs(choices, torch.float64, D=3, F=2))


@pytest.mark.parametrize("choices", ["two of five", "all to none", "some to none"])
def test_compiled_it_is_one_operator_that_keeps_the_rules_of_operators(choices: str) -> None:
    order, given = order_of(choices), inputs(choices, torch.float32)
    if choices != "some to none":
        assert_compiles(lambda *t: grouped_swiglu(*t, order), given)
    if choices != "all to none":
        places = (order.sorted, order.place, order.ends, order.n_tokens, order.k)
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(module._opaque, (*given, *places), test_utils=checks)


def test_autocast_lowers_the_products_and_gradients_come_back_wide() -> None:
    given = inputs("two of five", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_swiglu(*given, order_of("two of five"))
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), given))


def test_groups_hold_every_row_once_and_little_padding_within_the_room_of_a_compiled_operator() -> None:
    few_each, uneven = [48] * 64, [3, 900, 4, 0, 0, 2500, 7]
    for counts in ([3] * 64, [9] * 64, [33] * 8, [0] * 5, [1], [449] * 3, [10, 0, 900], few_each, uneven, [0, 0]):
        most = module._most_rows(torch.empty(sum(counts)), torch.empty(len(counts)))
        assert most >= module._room(module._groups(counts, True)[-1].rows.stop), counts
        for rounded in (False, True):
            groups, start, room = module._groups(counts, rounded), 0, [0] * len(counts)
            for group in groups:
                n = group.experts.stop - group.experts.start
                assert (group.rows.start, group.rows.stop) == (start, start + n * group.length)
                assert n == 1 or n * group.length <= module.ROWS
                start = group.rows.stop
                for expert in range(group.experts.start, group.experts.stop):
                    assert group.first == (room[expert] == 0)
                    room[expert] += group.length
            assert all(there >= wanted for there, wanted in zip(room, counts, strict=True)), counts
            assert counts != few_each or (len(groups) < 5 and start == sum(counts))


def test_few_lengths_and_sizes_are_asked_and_rows_behind_the_last_group_belong_to_no_expert() -> None:
    lengths = [module._length(n, True) for n in range(1, module.ROWS + 1)]
    assert len(set(lengths)) <= 160 and all(0 <= l - n < max(8, n / 16) for n, l in enumerate(lengths, 1))  # noqa: E741
    assert [module._length(n, False) for n in (0, 1, 77)] == [1, 1, 77]
    rooms = [module._room(n) for n in range(1, 20_000)]
    assert len(set(rooms)) < 200 and all(n <= room <= n + n / 16 for n, room in enumerate(rooms, 1))
    order = sort_by_expert(torch.randint(0, 3, (4099, 1), generator=torch.Generator().manual_seed(0)), 3)
    padded = module._pad(order, rounded=False)
    end = padded.groups[-1].rows.stop
    assert len(padded.source) == len(padded.real) == module._room(end) > end
    assert not padded.real[end:].any() and sorted(padded.source[padded.real].tolist()) == list(range(4099))


def test_rows_of_no_expert_end_in_the_last_experts_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_by_onednn", lambda dtype: True)
    order, given = order_of("all to one"), inputs("all to one", torch.float64)
    given[0] = torch.cat((torch.full((1, 7), 1e6, dtype=torch.float64), given[0].detach()[1:])).requires_grad_()
    grads = [torch.autograd.grad(f(*given, order).sum(), given) for f in (grouped_swiglu, grouped_swiglu_reference)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


# --- a few tokens -----------------------------------------------------------------------------------------------------

E = 6


def experts(dtype: torch.dtype) -> SwiGLUExperts:
    block = SwiGLUExperts(16, E, 8)
    with torch.no_grad():
        for i, p in enumerate(block.parameters()):
            p.copy_(drawn(*p.shape, seed=i))
    return block.to(dtype)


def routing(T: int, k: int, dropped: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(T)
    chosen = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(T)])
    chosen.view(-1)[torch.randperm(T * k, generator=generator)[:dropped]] = E
    weights = torch.rand(T, k, generator=generator)
    return Routing(chosen, weights, weights, {}, count(chosen, E), T * k - dropped if dropped else None)


@torch.no_grad()
def test_few_tokens_get_what_many_get(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [(1, 1, 0), (1, 4, 0), (7, 2, 0), (7, 3, 5), (2, 2, 4)]  # tokens, choices of each, those dropped
    for size, (dtype, bound) in pairs(sizes, [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.02)]):
        block, r, x = experts(dtype), routing(*size), drawn(size[0], 16, dtype=dtype)
        got = block(x, r)
        with monkeypatch.context() as patch:
            patch.setattr(experts_module, "few", lambda _: False)
            expected = block(x, r)
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound * expected.abs().max().item())


def test_a_few_tokens_without_gradients_take_the_short_way_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(experts_module, "few_swiglu", lambda x, *_: taken.append(len(x)) or torch.zeros_like(x))
    block = experts(torch.float32)
    for T in (2, FEW):
        with torch.no_grad():
            block(torch.randn(T, 16), routing(T, 2))
        block(torch.randn(T, 16), routing(T, 2))
    assert taken == [2]
    chosen = torch.zeros(FEW // 4, 4, dtype=torch.long)
    assert not few(chosen)
    with torch.no_grad():
        assert few(chosen) and not few(torch.zeros(FEW // 4 + 1, 4, dtype=torch.long)) and not few(chosen.to("meta"))


@torch.no_grad()
def test_experts_that_no_token_chose_are_not_read() -> None:
    block, r, x = experts(torch.float32), routing(1, 2), drawn(1, 16).float()
    idle = [e for e in range(E) if e not in r.experts]
    expected = block(x, r)
    block.gate_up[idle] = block.down[idle] = float("nan")
    assert torch.equal(block(x, r), expected)
