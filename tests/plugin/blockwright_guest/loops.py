"""A loop whose visits go up through the layers and down again, and an entry that mixes by learned shares."""

from __future__ import annotations

import torch
from torch import nn

from blockwright import Entry, Loop, register


@register("loop", "mirror")
class Mirror(Loop):
    """A visit of layers 1 and 2 is 1 2 2 1."""

    def cores(self):
        return [(*self.looped, *reversed(self.looped))]


@register("entry", "diagonal")
class Diagonal(Entry):
    """h ← core(a ⊙ h + (1 − a) ⊙ e) with a = σ(α) for each channel."""

    injects = True

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(d_model))

    def reset_parameters(self):
        self.alpha.zero_()

    def forward(self, x, entered, n, norm):
        return entered + self.alpha.sigmoid() * (x - entered)

    def parallel_plan(self):
        return {"alpha": "replicate"}
