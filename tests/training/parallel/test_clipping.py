"""Clipping is torch's: above the limit gradients shrink to it, and below it nothing changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from blockwright.training.parallel.clipping import clip, total_norm


def module() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for p in [*made.parameters()][:-1]:  # one has no gradient
        p.grad = torch.randn_like(p)
    return made


@pytest.mark.parametrize("share", [0.1, 0.999, 1.001, 50.0])
def test_norm_is_clipped_as_torch_does(share: float) -> None:
    ours, theirs = module(), module()
    limit = share * float(total_norm(ours.parameters()))
    clip(ours.parameters(), limit)
    nn.utils.clip_grad_norm_(theirs.parameters(), limit)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_each_number_is_clipped_as_torch_does() -> None:
    ours, theirs = module(), module()
    clip(ours.parameters(), 0.5, "value")
    nn.utils.clip_grad_value_(theirs.parameters(), 0.5)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert max(float(p.grad.abs().max()) for p in ours.parameters() if p.grad is not None) == 0.5
