"""Means over the tokens of ranks, and gradients clipped as torch does."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockwright import registry
from blockwright.blocks.conformance.setting import Setting, tokens
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.over_ranks import Alone, OverRanks
from blockwright.training.parallel.collectives import clip, total_norm
from blockwright.training.parallel.ranks import balance_over

AVERAGING = [
    (kind, name)
    for kind in registry.kinds()
    for name in registry.names(kind)
    if issubclass(registry.lookup(kind, name).cls, OverRanks)
]


class Rank:
    """One of two ranks, which are threads."""

    number = 2

    def __init__(self, index: int, given: list[Any], barrier: threading.Barrier) -> None:
        self.index, self.given, self.barrier = index, given, barrier

    def sum(self, value: Tensor) -> Tensor:
        self.given[self.index] = value.detach()
        self.barrier.wait(60)
        total = self.given[0] + self.given[1]
        self.barrier.wait(60)
        return total


def losses(decoder: Decoder, ids: Tensor, segments: Tensor) -> Tensor:
    routings = decoder.hidden(ids, segments=segments)[1]
    return torch.stack([loss for r in routings if r is not None for loss in r.losses.values()]).sum()


@pytest.mark.parametrize(("kind", "name"), AVERAGING)
def test_average_of_the_ranks_is_the_mean_over_all_tokens(kind: str, name: str) -> None:
    decoder = Setting(kind, name, brief=True).decoder().double().train()
    ids, segments = tokens(5, 9), torch.zeros(5, 9, dtype=torch.int64)
    for row, real in enumerate((9, 2, 9, 3, 1)):
        segments[row, real:] = -1
    given: list[Any] = [None, None]
    barrier = threading.Barrier(2)

    def of_rank(index: int) -> Tensor:
        own: Any = copy.deepcopy(decoder)
        balance_over(own, Rank(index, given, barrier), Alone())  # type: ignore[arg-type]
        rows = slice(0, 3) if index == 0 else slice(3, 5)
        return losses(own, ids[rows], segments[rows])

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(of_rank, range(2))
    torch.testing.assert_close((3 * one + 2 * other) / 5, losses(decoder, ids, segments), rtol=1e-6, atol=1e-8)


def graded() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for p in [*made.parameters()][:-1]:  # one has no gradient
        p.grad = torch.randn_like(p)
    return made


def test_norms_and_numbers_are_clipped_as_torch_does() -> None:
    for share in (0.1, 0.999, 1.001, 50.0, None):
        ours, theirs = graded(), graded()
        if share is None:
            clip(ours.parameters(), 0.5, "value")
            nn.utils.clip_grad_value_(theirs.parameters(), 0.5)
        else:
            limit = share * float(total_norm(ours.parameters()))
            clip(ours.parameters(), limit)
            nn.utils.clip_grad_norm_(theirs.parameters(), limit)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
