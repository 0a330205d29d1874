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
    """What the terms of the loss are means over: scored tokens, of each depth of multi-token prediction, sequences.

    Args:
        targets: the next token after each, [B,T]
        segments: the document of each token, [B,T]; None where a row is one document
        depths: of multi-token prediction; depth k predicts the token k further on
    """
    counts = {"total": count_scored(targets), "sequences": torch.tensor(len(targets))}
    later = {f"mtp{k}": count_scored(later_targets(targets, segments, k)) for k in range(1, depths + 1)}
    return {**counts, **later}
