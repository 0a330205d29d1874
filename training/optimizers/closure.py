"""The closure that a trainer gives an optimizer's step, which computes the loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch


def evaluated(closure: Callable[[], float] | None) -> float | None:
    """The loss of a closure, computed with gradients within a step that has none; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
