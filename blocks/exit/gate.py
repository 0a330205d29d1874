from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Kind, Placement
from blockwright.blocks.exit.base import Exit
from blockwright.blocks.precision import at_least_fp32, full_linear
from blockwright.registry import register
from blockwright.registry.ranges import NonNegative, Share


@register("exit", "gate")
class Gate(Exit):
    """A learned gate after each visit, the same for all.

    Ouro, arXiv 2510.25741: λ_t = σ(w·norm(h_t) + b), p_t = λ_t Π_{j<t}(1 − λ_j), and the last visit has what is left;
    loss Σ_t p_t nll_t − β H(p), H the entropy of a token's p. In evaluation a token leaves after the first visit t with
    Σ_{j≤t} p_j ≥ threshold. In fp32 at least. The paper's second stage, which trains the gate alone by how much each
    visit lowers the loss, is left out.

    Args:
        entropy: β; 0.1 and later 0.05 in the paper
        threshold: of the probability to have left; null: every token makes all visits, as the released models do
    """

    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}
    conformance_settings: ClassVar[Mapping[str, Any]] = {"entropy": 0.5, "threshold": 0.8}

    def __init__(self, d_model: int, entropy: NonNegative = 0.05, threshold: Share | None = None) -> None:
        super().__init__()
        self.entropy, self.threshold = entropy, threshold
        self.weight = nn.Parameter(torch.empty(1, d_model))
        self.bias = nn.Parameter(torch.empty(1))

    def probabilities(self, states: Sequence[Tensor]) -> Tensor:
        left, found = torch.ones_like(at_least_fp32(states[-1][..., 0])), []
        for h in states[:-1]:
            flat = full_linear(at_least_fp32(h.flatten(0, 1)), at_least_fp32(self.weight)) + at_least_fp32(self.bias)
            leaves = flat.view(h.shape[:2]).sigmoid()
            found.append(left * leaves)
            left = left * (1 - leaves)
        if not found:  # one visit was drawn: the gate's gradient is 0 and not missing, which DDP would wait for
            left = left + 0 * (self.weight.sum() + self.bias.sum())
        return torch.stack([*found, left])

    def losses(self, probabilities: Tensor, real: Tensor | None) -> dict[str, Tensor]:
        entropy = -(probabilities * probabilities.clamp(min=1e-20).log()).sum(0)
        return {"exit_entropy": -self.entropy * self.mean(entropy, real)}

    def choose(self, states: Sequence[Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        if self.threshold is None:
            return states[-1]
        left = self.probabilities([norm(h) for h in states]).cumsum(0)
        left[-1] = 1  # rounding must keep no token
        visit = (left >= self.threshold).int().argmax(0)
        return torch.stack(tuple(states)).gather(0, visit[None, ..., None].expand(1, *states[0].shape))[0]

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": "replicate", "bias": "replicate"}
