"""Lightning's low precisions, limited to the dtype of weights, and so of their products."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from lightning.pytorch.plugins.precision import Precision

LOW = ("bf16-true", "16-true")


def lower_only_weights(precision: Precision) -> None:
    """Make ``bf16-true`` and ``16-true`` leave batches and the default dtype alone; other precisions do so already.

    Lightning casts every batch, and makes tensors of Python numbers bf16 inside a step. A model needs neither: it reads
    token ids, and has the dtype of its weights. But weights of targets, numbers of bytes, rewards and log-probabilities
    would be rounded to 8 bits, in a step and not in a validation or a rollout of the same run.

    Args:
        precision: the trainer's plug-in, of any strategy; changed in place
    """
    if precision.precision in LOW:
        precision.convert_input = _as_given  # type: ignore[method-assign]
        precision.forward_context = nullcontext  # type: ignore[method-assign]


def _as_given(data: Any) -> Any:
    return data
