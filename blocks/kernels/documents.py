"""What attention needs to know of packed documents, made once a batch and found again by every layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

V = TypeVar("V")

PADDING = -1  # the document of padding: it is in no loss, no load and no figure

_made = WeakTensorKeyDictionary()  # segments → what was made of them; both go with the batch


def once(segments: Tensor, key: Hashable, make: Callable[[Tensor], V]) -> V:
    """``make`` of these segments, the first time; then what it made.

    It is given an alias: what refers to ``segments`` itself would never let it go. A compiler makes it in each graph.
    """
    if torch.compiler.is_compiling():
        return make(segments)
    known = _made.setdefault(segments, {})
    if key not in known:
        known[key] = make(segments.data)
    return known[key]


def is_real(segments: Tensor) -> Tensor:
    """Document ids [B,T] → which tokens are not padding, [B,T] booleans."""
    return segments != PADDING


def starts(segments: Tensor) -> Tensor:
    """Document ids [B,T] → where the document of each token begins in its row, [B,T]."""
    index = torch.arange(segments.shape[1], device=segments.device)
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return torch.where(begins, index, 0).cummax(1).values


def borders(segments: Tensor) -> Tensor:
    """Where each document begins among the B·T tokens, and B·T, int32. The host waits for their number."""
    begins = starts(segments) == torch.arange(segments.shape[1], device=segments.device)
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).to(torch.int32)
