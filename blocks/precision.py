"""State that keeps its dtype, whatever precision the model around it is cast to.

A trainer casts the whole model (``module.to(torch.bfloat16)``) and builds it under a low default dtype. Weights are
meant to follow. State that sums or counts is not: in bfloat16, 256 + 1 is 256, and a bias of 0.5 cannot move by 0.001.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class KeepsDtype(nn.Module):
    """A module whose own buffers keep the dtype they were registered with; casts only move them."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsDtype:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


@contextmanager
def built_in_full_precision() -> Iterator[None]:
    """Inside, tensors made without a dtype are fp32, whatever default dtype is in force."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(default)
