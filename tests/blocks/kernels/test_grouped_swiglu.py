"""The experts' one pass computes what dispatch, two grouped products and combine compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch.autograd import gradcheck

from blockwright.blocks.kernels import grouped_swiglu as module
from blockwright.blocks.kernels.grouped_matmul import Order, sort_by_expert
from blockwright.blocks.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_reference

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
    order, T = order_of(choices), len(CHOICES[choices][0])
    torch.manual_seed(0)
    shapes = ((T, D), (len(order.sorted),), (5, 2 * F, D), (5, D, F))
    return [torch.randn(s, dtype=dtype).mul_(0.7).requires_grad_() for s in shapes]


@pytest.mark.parametrize(
    ("choices", "rows", "short", "rounded"), pairs(list(CHOICES), [1024, 4], [256, 0], [False, True])
)
def test_one_pass_and_its_gradients_equal_the_reference(
    choices: str, rows: int, short: int, rounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    monkeypatch.setattr(module, "SHORT", short)
    monkeypatch.setattr(module, "multiplies_by_onednn", lambda dtype: rounded)
    order = order_of(choices)
    for dtype, tolerance in PRECISIONS:
        given = inputs(choices, dtype)
        wide = [t.detach().double().requires_grad_() for t in given]
        y, expected = grouped_swiglu(*given, order), grouped_swiglu_reference(*wide, order)
        assert y.dtype == dtype and y.shape == given[0].shape
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
        cotangent = torch.randn_like(expected)
        got = torch.autograd.grad(y, given, cotangent.to(dtype))
        for one, other in zip(got, torch.autograd.grad(expected, wide, cotangent.to(dtype).double()), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=2 * tolerance, atol=4 * tolerance)


def test_gradients_pass_gradcheck() -> None:
    order = order_of("some to none")
    assert gradcheck(lambda *t: grouped_swiglu(*t, order), inputs("some to none", torch.float64, D=3, F=2))


def test_expert_without_tokens_gets_a_gradient_of_zero_whatever_was_in_that_memory() -> None:
    for _ in range(3):
        spoilt = [torch.full((5, 14, 7), float("nan")) for _ in range(8)]
        del spoilt
        given = inputs("all to one", torch.float32)
        _, _, gate_up, down = torch.autograd.grad(grouped_swiglu(*given, order_of("all to one")).sum(), given)
        assert (gate_up[:4] == 0).all() and (down[:4] == 0).all() and (gate_up[4] != 0).any()


@pytest.mark.parametrize("choices", ["two of five", "all to none"])
def test_compiled_it_is_one_operator_and_the_same(choices: str) -> None:
    order, given = order_of(choices), inputs(choices, torch.float32)
    cotangent = torch.randn(order.n_tokens, 7)

    def run(experts: Any) -> list[Tensor]:
        y = experts(*given, order)
        return [y, *torch.autograd.grad(y, given, cotangent)]

    torch._dynamo.reset()
    compiled = run(torch.compile(grouped_swiglu, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, run(grouped_swiglu), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("choices", ["two of five", "some to none"])
def test_the_operator_keeps_the_rules_of_operators(choices: str) -> None:
    order, given = order_of(choices), inputs(choices, torch.float32)
    places = (order.sorted, order.place, order.ends, order.n_tokens, order.k)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._opaque, (*given, *places), test_utils=checks)


@pytest.mark.parametrize("counts", [[3] * 64, [9] * 64, [33] * 8, [0] * 5, [1], [449] * 3, [10, 0, 900]], ids=str)
def test_no_padding_makes_more_rows_than_a_compiled_operator_has_room_for(counts: list[int]) -> None:
    most = module._most_rows(torch.empty(sum(counts)), torch.empty(len(counts)))
    groups = module._groups(counts, True)
    assert most >= module._room(groups[-1].rows.stop)


def test_autocast_lowers_the_products_and_gradients_come_back_wide() -> None:
    given = inputs("two of five", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = grouped_swiglu(*given, order_of("two of five"))
    assert y.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), given))


def test_few_lengths_are_asked_of_a_library_that_compiles_for_each() -> None:
    lengths = {module._length(n, True) for n in range(1, module.ROWS + 1)}
    assert len(lengths) <= 160
    assert all(0 <= module._length(n, True) - n < max(8, n / 16) for n in range(1, module.ROWS + 1))
    assert [module._length(n, False) for n in (0, 1, 77)] == [1, 1, 77]


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("counts", [[48] * 64, [3, 900, 4, 0, 0, 2500, 7], [1], [0, 0]], ids=str)
def test_groups_hold_every_row_once_and_little_padding(counts: list[int], rounded: bool) -> None:
    groups, start, room = module._groups(counts, rounded), 0, [0] * len(counts)
    for group in groups:
        n = group.experts.stop - group.experts.start
        assert (group.rows.start, group.rows.stop) == (start, start + n * group.length)
        assert n == 1 or n * group.length <= module.ROWS
        start = group.rows.stop
        for expert in range(group.experts.start, group.experts.stop):
            assert group.first == (room[expert] == 0)
            room[expert] += group.length
    assert all(there >= count for there, count in zip(room, counts, strict=True))
    if counts == [48] * 64:
        assert len(groups) < 5 and start == sum(counts)


def test_memory_is_of_few_sizes_and_rows_behind_the_last_group_belong_to_no_expert() -> None:
    rooms = [module._room(n) for n in range(1, 20_000)]
    assert len(set(rooms)) < 200
    assert all(n <= room <= n + n / 16 for n, room in enumerate(rooms, 1))
    order = sort_by_expert(torch.randint(0, 3, (4099, 1), generator=torch.Generator().manual_seed(0)), 3)
    padded = module._pad(order, rounded=False)
    end = padded.groups[-1].rows.stop
    assert len(padded.source) == len(padded.real) == module._room(end) > end
    assert not padded.real[end:].any() and sorted(padded.source[padded.real].tolist()) == list(range(4099))


def test_rows_of_no_expert_end_in_the_last_experts_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "multiplies_by_onednn", lambda dtype: True)
    given = inputs("all to one", torch.float64)
    given[0] = torch.cat((torch.full((1, 7), 1e6, dtype=torch.float64), given[0].detach()[1:])).requires_grad_()
    got = torch.autograd.grad(grouped_swiglu(*given, order_of("all to one")).sum(), given)
    right = torch.autograd.grad(grouped_swiglu_reference(*given, order_of("all to one")).sum(), given)
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
