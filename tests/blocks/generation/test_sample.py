"""Drawing a token from logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.generation.sample import NotFiniteError, Sampling, candidates, drawable, sample
from blockwright.registry import BlockError

LOGITS = torch.tensor([1.0, 0.0, -1.0, 2.0])  # of probabilities 0.237, 0.087, 0.032, 0.644


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def frequencies(sampling: Sampling, n: int = 5_000) -> Tensor:
    draws = sample(LOGITS.expand(n, -1), sampling, generators(1) * n)
    return torch.zeros(4).scatter_add_(0, draws, torch.ones(n)) / n


def test_samples_follow_the_softmax_of_what_is_left_at_that_temperature() -> None:
    likeliest = LOGITS.masked_fill(torch.tensor([False, True, True, False]), -math.inf)
    rows = {Sampling(0.5): LOGITS / 0.5, Sampling(3.0): LOGITS / 3, Sampling(1e9): LOGITS * 0}
    for sampling, logits in {**rows, Sampling(top_k=2): likeliest}.items():
        torch.testing.assert_close(frequencies(sampling), logits.softmax(-1), rtol=0, atol=0.025)


def test_temperature_zero_takes_the_likeliest_whatever_else_is_said() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]])
    assert sample(logits, Sampling(0, top_k=2, min_p=0.3), generators(2)).tolist() == [1, 0]


CUTS: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 1}, "3"), ({"top_k": 99}, "0123"), ({"top_p": 0.6}, "3"), ({"top_p": 0.65}, "03"),
    ({"top_p": 0.9}, "013"), ({"top_p": 1.0}, "0123"), ({"top_p": 1e-9}, "3"), ({"top_p": 1e-320}, "3"),  # 0 in fp32
    ({"min_p": 0.0}, "0123"), ({"min_p": 0.1}, "013"), ({"min_p": 0.2}, "03"), ({"min_p": 1.0}, "3"),
    ({"top_k": 3, "top_p": 0.95, "min_p": 0.2}, "03"), ({"top_k": 2, "top_p": 0.72}, "3"),  # of the two left, 0.731
]  # fmt: skip


def test_each_cut_keeps_what_it_says_and_those_logits() -> None:
    logits = torch.stack((LOGITS, LOGITS.flip(0)))  # each row by itself
    for fields, kept in CUTS:
        left = candidates(logits, Sampling(**fields))
        expected = torch.tensor([str(i) in kept for i in range(4)])
        for row, right in zip(left, (LOGITS, LOGITS.flip(0)), strict=True):
            assert torch.equal(row, right.masked_fill(~expected, -math.inf)), fields
            expected = expected.flip(0)


def test_repetition_penalty_lowers_what_was_seen_and_nothing_else() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 1.5, 3.0]]), torch.tensor([[True, True, False, True]])
    greedy = Sampling(temperature=0, repetition_penalty=3.0)
    assert sample(logits, greedy, generators(1), seen).tolist() == [2]  # 0.67, −6, 1.5, 1
    assert sample(logits, greedy, generators(1), torch.zeros_like(seen)).tolist() == [3]


def test_a_row_draws_the_same_beside_others_and_as_torch_does() -> None:
    hidden = torch.arange(50) % 3 == 0
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0)).masked_fill(hidden, -math.inf)
    ours, theirs, alone = generators(5), generators(5), generators(5)
    for _ in range(20):
        together = sample(logits, Sampling(), ours)
        rows = [torch.multinomial(row, 1, generator=g) for row, g in zip(logits.softmax(-1), theirs, strict=True)]
        assert torch.equal(together, torch.cat(rows))
        each = [sample(logits[i : i + 1], Sampling(), alone[i : i + 1]) for i in range(5)]
        assert torch.equal(together, torch.cat(each))


def test_numbers_at_the_edge_of_their_type_do_what_small_and_large_ones_do() -> None:
    far, seen = torch.tensor([[-80.0, 90.0, 89.0]]), torch.tensor([[False, True, True, True]])
    for temperature in (5e-324, 1e-40, 1e-38, 1e-20, 1e9):
        for penalty in (1e-9, 1.0, 1e9):
            token = sample(far, Sampling(temperature, repetition_penalty=penalty), generators(1), seen[:, 1:])
            assert temperature > 1 or penalty > 1 or token.tolist() == [1]
    for small in (5e-324, 1e-45, 1e-30):
        for dtype in (torch.float32, torch.float64):
            logits = LOGITS.to(dtype)[None]
            for sampling in (Sampling(small), Sampling(top_p=small), Sampling(small, top_p=small, min_p=1.0)):
                assert sample(logits, sampling, generators(1)).item() == 3
            for penalty, token in ((1e9, 0), (1e-9, 3)):
                assert sample(logits, Sampling(small, repetition_penalty=penalty), generators(1), seen) == token


WRONG = {"temperature": [-1.0, math.inf, math.nan, 10**400], "top_k": [0], "top_p": [0.0, 1.5], "min_p": [-0.1, 1.1]}
WRONG["repetition_penalty"] = [0.0, 1e-40, 10**400, math.inf]


def test_fields_out_of_range_are_refused_by_name() -> None:
    for name, values in WRONG.items():
        for value in values:
            with pytest.raises(BlockError) as caught:
                Sampling(**{name: value})  # type: ignore[arg-type]
            assert caught.value.parameter == name and caught.value.remedy, value


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.7, top_k=2), Sampling(1.0, top_p=0.5)])
def test_logits_that_are_not_finite_or_exclude_every_token_draw_none(sampling: Sampling) -> None:
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.full((2, 5), -math.inf) if value < 0 else torch.zeros(2, 5)
        logits[0, 3], logits[1, 3] = 9, value
        assert drawable(logits) == [True, False]
        with pytest.raises(NotFiniteError):
            sample(logits, sampling, generators(2))
    assert sample(logits[:1], sampling, generators(1)) == 3
