"""Exceptions of a check: the block breaks a promise, or is exempt from it."""

from __future__ import annotations

import torch
from torch import Tensor


class PromiseError(AssertionError):
    """The block does not satisfy the check's docstring; the message says what was seen."""


class ExemptError(Exception):
    """The check does not apply to this block; the message says why."""


def must(holds: bool, reason: str) -> None:
    """Raise ``PromiseError`` with the reason unless ``holds``."""
    if not holds:
        raise PromiseError(reason)


def must_agree(got: Tensor, expected: Tensor, bound: float, what: str) -> None:
    """Raise ``PromiseError`` unless two tensors have the same shape and differ by at most ``bound``."""
    must(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    must(bool(torch.isfinite(got).all() and torch.isfinite(expected).all()), f"{what}: values that are not finite")
    off = (got.double() - expected.double()).abs().max().item() if got.numel() else 0.0
    must(off <= bound, f"{what}: off by {off:.3g}, at most {bound:g} allowed")
