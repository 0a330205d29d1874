"""Experts in one pass over the tokens of each, and those of a few tokens: what products one after the other give."""

from __future__ import annotations

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F

from blockwright.blocks.experts import SwiGLUExperts
from blockwright.blocks.gating.base import Routing, count
from blockwright.blocks.kernels.grouped_matmul import Order, combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.plugins.fast_cpu import grouped_swiglu as module
from blockwright.plugins.fast_cpu.grouped_swiglu import FEW, few, grouped_swiglu
from tests.blocks.kernels.compared import assert_compiles, assert_same, drawn, leaves


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


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


def grouped_swiglu_reference(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, order: Order) -> Tensor:
    gate, up = grouped_matmul(dispatch(x, order), gate_up, order.ends).chunk(2, -1)
    hidden = F.silu(gate) * up * weights.to(gate.dtype)[:, None]
    return combine(grouped_matmul(hidden, down, order.ends), order)


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
            patch.setattr(module, "few", lambda _: False)
            expected = block(x, r)
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound * expected.abs().max().item())


def test_a_few_tokens_without_gradients_take_the_short_way_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(module, "few_swiglu", lambda x, *_: taken.append(len(x)) or torch.zeros_like(x))
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


def test_an_expert_without_tokens_gets_a_gradient_of_zero_whatever_was_in_that_memory() -> None:
    for counts in ([5, 1, 9, 2], [0, 3, 4, 1], [3, 0, 0, 5], [0, 0, 7, 0]):
        order = sort_by_expert(torch.tensor([[e] for e, n in enumerate(counts) for _ in range(n)]), 4)
        spoilt = [torch.full((4, 8, 16), float("nan")) for _ in range(8)]
        del spoilt
        rows, gate_up, down = leaves((sum(counts), 16), (4, 8, 16), (4, 16, 4), dtype=torch.float32)
        y = grouped_swiglu(rows, torch.ones(sum(counts)), gate_up, down, order)
        for grad in torch.autograd.grad(y.sum(), (gate_up, down)):
            assert [bool((grad[e] != 0).any()) for e in range(4)] == [n > 0 for n in counts] and grad.isfinite().all()
