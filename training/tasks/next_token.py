"""The objective of causal language modelling, as functions of a decoder's outputs and targets."""

from __future__ import annotations

from torch import Tensor

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.layer import later_targets


def count_scored(targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """How many targets [B,T] are scored, or the sum of their weights [B,T]."""
    scored = targets != IGNORED
    return scored.sum() if weights is None else (scored * weights).sum()


def count_each_depth(
    targets: Tensor, segments: Tensor | None, depths: int, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Denominators of the loss terms: scored tokens, and those of each multi-token prediction depth.

    Args:
        targets: the next token after each, [B,T]
        segments: the document of each token, [B,T]; None where a row is one document
        depths: of multi-token prediction; depth k predicts k tokens further ahead
        weights: of the targets, [B,T], for the total only; None for 1
    """
    counts = {"total": count_scored(targets, weights)}
    later = {f"mtp{k}": count_scored(later_targets(targets, segments, k)) for k in range(1, depths + 1)}
    return {**counts, **later}
