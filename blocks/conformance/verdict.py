"""What a check raises when a block does not keep a promise, or is not held to it."""

from __future__ import annotations

import torch
from torch import Tensor


class PromiseError(AssertionError):
    """The block does not do what the check's docstring promises; the message says what was seen."""


class ExemptError(Exception):
    """The promise does not concern this block; the message says why."""


def must(holds: bool, reason: str) -> None:
    """Raise ``PromiseError`` with the reason unless it holds."""
    if not holds:
        raise PromiseError(reason)


def must_agree(got: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Raise ``PromiseError`` unless two tensors have one shape and differ by at most ``bound`` everywhere."""
    must(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    must(bool(torch.isfinite(got).all() and torch.isfinite(expected).all()), f"{what}: values that are not finite")
    off = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    must(off <= bound, f"{what}: off by {off:.3g}, at most {bound:g} allowed")
