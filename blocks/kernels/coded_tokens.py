"""Tokens become the codes of a cache: in one call of the library in C where it can, else by torch.

By torch a token is two dozen small operators, which take as long as its attention to 2,000 tokens. The reference is
``quantise``; codes and scales are equal bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.kernels.coded_library import described, in_reach, library
from blockwright.blocks.kernels.quantise import Codes, quantise

A_THREAD = 32  # tokens, of which a thread takes longer than it needs to start


def store(x: Tensor, into: Codes) -> None:
    """Quantise tokens.

    Args:
        x: [B,T,W]
        into: codes and scales of as many tokens, which are overwritten
    """
    if suits(x, into):
        store_compiled(x, into)
    else:
        store_reference(x, into)


def suits(x: Tensor, into: Codes) -> bool:
    """Whether there are as many tokens as codes, the library reaches both, nothing needs a gradient or is traced, and
    there is a compiler."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(x) is not Tensor or not x.is_cpu:
        return False
    alike = x.shape == (*into.codes.shape[:2], sum(into.sizes))  # else torch broadcasts, or raises
    return alike and in_reach(into) and library() is not None


def store_reference(x: Tensor, into: Codes) -> None:
    """``store`` by its definition."""
    codes, scales = quantise(x, into.bits, into.sizes)
    into.codes.copy_(codes)
    into.scales.copy_(scales)


def store_compiled(x: Tensor, into: Codes) -> None:
    """``store`` in C."""
    made, tokens = library(), x.shape[0] * x.shape[1]
    assert made is not None
    floats = x.float().contiguous()
    made.store(described(into), floats.data_ptr(), min(torch.get_num_threads(), -(-tokens // A_THREAD)))
