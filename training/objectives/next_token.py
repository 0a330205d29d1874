"""The objective of causal language modelling, as functions of a decoder's outputs and targets."""

from __future__ import annotations

import torch
from torch import Tensor

from blocks.kernels.cross_entropy import IGNORED
from blocks.mtp import later_targets


def count_scored(targets: Tensor) -> Tensor:
    """How many targets [B,T] are scored."""
    return (targets != IGNORED).sum()


def count_each_depth(targets: Tensor, segments: Tensor | None, depths: int) -> dict[str, Tensor]:
    """Denominators of the loss terms: scored tokens, those of each multi-token prediction depth, sequences.

    Args:
        targets: the next token after each, [B,T]
        segments: the document of each token, [B,T]; None where a row is one document
        depths: of multi-token prediction; depth k predicts k tokens further ahead
    """
    counts = {"total": count_scored(targets), "sequences": torch.tensor(len(targets))}
    later = {f"mtp{k}": count_scored(later_targets(targets, segments, k)) for k in range(1, depths + 1)}
    return {**counts, **later}
