"""Drawing a token from logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.generation.sample import NotFiniteError, Sampling, candidates, drawable, sample
from blockwright.registry import BlockError

LOGITS = torch.tensor([1.0, 0.0, -1.0, 2.0])


def frequencies(sampling: Sampling, n: int = 5_000) -> Tensor:
    probabilities = torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    draws = sample(LOGITS.expand(n, -1), sampling, [generator] * n)
    return probabilities.scatter_add_(0, draws, torch.ones(n)) / n


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_samples_follow_the_softmax_at_that_temperature(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(Sampling(temperature)), expected, rtol=0, atol=0.025)


def test_only_the_likeliest_k_are_drawn_in_their_proportions() -> None:
    expected = torch.zeros(4)
    expected[[0, 3]] = LOGITS[[0, 3]].softmax(-1)
    torch.testing.assert_close(frequencies(Sampling(top_k=2)), expected, rtol=0, atol=0.025)


def test_temperature_zero_takes_the_likeliest_whatever_else_is_said() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert sample(logits, Sampling(0, top_k=2, min_p=0.3), [torch.Generator()] * 2).tolist() == [1, 0]


# Probabilities of LOGITS: 0.237, 0.087, 0.032, 0.644.
@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"top_k": 1}, {3}),
        ({"top_k": 99}, {0, 1, 2, 3}),
        ({"top_p": 0.6}, {3}),
        ({"top_p": 0.65}, {0, 3}),
        ({"top_p": 0.9}, {0, 1, 3}),
        ({"top_p": 1.0}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {3}),
        ({"top_p": 1e-320}, {3}),  # 0 in fp32
        ({"min_p": 0.0}, {0, 1, 2, 3}),
        ({"min_p": 0.1}, {0, 1, 3}),
        ({"min_p": 0.2}, {0, 3}),
        ({"min_p": 1.0}, {3}),
        ({"top_k": 3, "top_p": 0.95, "min_p": 0.2}, {0, 3}),
        ({"top_k": 2, "top_p": 0.72}, {3}),  # of the two that are left, 0.731
    ],
    ids=str,
)
def test_each_cut_keeps_what_it_says(fields: dict[str, Any], kept: set[int]) -> None:
    logits = torch.stack((LOGITS, LOGITS.flip(0)))  # each row by itself
    left = candidates(logits, Sampling(**fields)) > -math.inf
    assert set(left[0].nonzero().flatten().tolist()) == kept
    assert {3 - i for i in left[1].nonzero().flatten().tolist()} == kept


def test_cuts_leave_the_logits_they_keep() -> None:
    left = candidates(LOGITS[None], Sampling(top_k=3, top_p=0.9, min_p=0.01))[0]
    assert left[[0, 3]].tolist() == [1.0, 2.0]


def test_repetition_penalty_lowers_what_was_seen_and_nothing_else() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 1.5, 3.0]]), torch.tensor([[True, True, False, True]])
    greedy = Sampling(temperature=0, repetition_penalty=3.0)
    assert sample(logits, greedy, [torch.Generator()], seen).tolist() == [2]  # 0.67, −6, 1.5, 1
    assert sample(logits, greedy, [torch.Generator()], torch.zeros_like(seen)).tolist() == [3]


@pytest.mark.parametrize("fields", [{"temperature": t} for t in (5e-324, 1e-40, 1e-38, 1e-20, 1e9)], ids=str)
def test_numbers_at_their_limits_draw_a_token(fields: dict[str, float]) -> None:
    logits, seen = torch.tensor([[-80.0, 90.0, 89.0]]), torch.ones(1, 3, dtype=torch.bool)
    for penalty in (1e-9, 1.0, 1e9):
        sampling = Sampling(**fields, repetition_penalty=penalty)
        token = sample(logits, sampling, [torch.Generator().manual_seed(0)], seen)
        assert fields["temperature"] > 1 or penalty > 1 or token.tolist() == [1]


def test_a_row_draws_the_same_beside_others() -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    together = sample(logits, Sampling(), [torch.Generator().manual_seed(i) for i in range(5)])
    for i in range(5):
        assert sample(logits[i : i + 1], Sampling(), [torch.Generator().manual_seed(i)])[0] == together[i]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1.0),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("temperature", 10**400),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 10**400),
        ("repetition_penalty", math.inf),
    ],
)
def test_fields_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(BlockError) as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert caught.value.parameter == name and caught.value.remedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("small", [5e-324, 1e-45, 1e-30])
def test_numbers_at_the_edge_of_their_type_do_what_small_and_large_ones_do(small: float, dtype: torch.dtype) -> None:
    logits, generators = LOGITS.to(dtype)[None], [torch.Generator().manual_seed(0)]
    for sampling in (Sampling(small), Sampling(top_p=small), Sampling(small, top_p=small, min_p=1.0)):
        assert sample(logits, sampling, generators).item() == 3
    seen = torch.tensor([[False, True, True, True]])
    assert sample(logits, Sampling(small, repetition_penalty=1e9), generators, seen) == 0
    assert sample(logits, Sampling(small, repetition_penalty=1e-9), generators, seen) == 3
    torch.testing.assert_close(frequencies(Sampling(1e9)), torch.full((4,), 0.25), rtol=0, atol=0.025)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.7, top_k=2), Sampling(1.0, top_p=0.5)])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_draw_no_token(value: float, sampling: Sampling) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    assert drawable(logits) == [True, False]
    with pytest.raises(NotFiniteError):
        sample(logits, sampling, [torch.Generator() for _ in range(2)])


def test_tokens_are_excluded_by_negative_infinity_but_not_all_of_them() -> None:
    logits = torch.full((2, 5), -math.inf)
    logits[0, 3] = 0
    assert drawable(logits) == [True, False]
    for sampling in (Sampling(), Sampling(0.0)):
        assert sample(logits[:1], sampling, [torch.Generator()]) == 3
        with pytest.raises(NotFiniteError):
            sample(logits, sampling, [torch.Generator() for _ in range(2)])


def test_draws_are_those_of_torch() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).masked_fill(
        torch.arange(50) % 3 == 0, -math.inf
    )
    ours, theirs = ([torch.Generator().manual_seed(i) for i in range(4)] for _ in range(2))
    for _ in range(20):
        rows = [torch.multinomial(row, 1, generator=g) for row, g in zip(logits.softmax(-1), theirs, strict=True)]
        assert torch.equal(sample(logits, Sampling(), ours), torch.cat(rows))
