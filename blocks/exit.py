"""The contract of ``exit``: after which visit of a loop a token leaves it. A child of ``loop``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block, Kind
from blockwright.blocks.over_ranks import OverRanks
from blockwright.blocks.precision import at_least_fp32, full_linear
from blockwright.registry import family, register
from blockwright.registry.ranges import NonNegative, Share


@family("exit", context=("visits",), in_layers=False)
class Exit(OverRanks, Block):
    """Gives each visit a probability that the token leaves after it. Context: ``visits``, r.

    In training the loss is the expected one, Σ_t p_t nll_t, and what ``losses`` adds. In evaluation ``choose`` takes
    one visit's state for each token. All visits are computed all the same, so that every visit has a full cache: an
    exit changes which state predicts, and does not save time.
    """

    counted_as: ClassVar[str | None] = "loop"
    # The head's logits of each visit are computed again for the gradient, and recomputation is not counted.
    flops_within: ClassVar[float | None] = 0.06

    def probabilities(self, states: Sequence[Tensor]) -> Tensor:
        """Normalised states of each visit, r of [B,T,D] → probabilities [r,B,T], which add up to 1 over r."""
        raise NotImplementedError

    def losses(self, probabilities: Tensor, real: Tensor | None) -> dict[str, Tensor]:
        """Name → further loss, a mean over tokens (``OverRanks.mean``), already weighted.

        Args:
            probabilities: [r,B,T]
            real: [B,T], which are tokens and not padding; None for all
        """
        return {}

    def choose(self, states: Sequence[Tensor], norm: Callable[[Tensor], Tensor]) -> Tensor:
        """States of each visit, r of [B,T,D] → the state with which each token leaves, [B,T,D].

        Args:
            norm: makes the states that ``probabilities`` reads
        """
        raise NotImplementedError


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
