"""Experts for a few tokens, as in decoding: no sort and no grouped product, only the chosen experts' matrices.

With few (token, choice) pairs, time goes into reading weights and launching operators. Grouped products launch one per
expert, chosen or not; here unchosen experts cost nothing. CPU only: elsewhere the routing would have to be copied from
the device first.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.products import linear

FEW = 64  # pairs; with more, most experts are chosen and a Python loop costs more than the sort


def few(experts: Tensor) -> bool:
    """Whether choices [T,k] are few, and nothing (gradients, a compiler, another device) requires the general path."""
    usual = torch.is_grad_enabled() or torch.compiler.is_compiling() or experts.device.type != "cpu"
    return not usual and experts.numel() <= FEW


def few_swiglu(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Σ over a token's choices of w · W_down,e (silu(W_gate,e x) ⊙ W_up,e x).

    Args:
        x: [T,D]
        experts: [T,k]; E means no expert
        weights: [T,k]
        gate_up: [E,2F,D], gate rows first
        down: [E,D,F]

    Returns:
        [T,D]
    """
    flat, k = experts.flatten().tolist(), experts.shape[1]
    pairs = sorted((e, i) for i, e in enumerate(flat) if e < len(gate_up))
    if not pairs:
        return torch.zeros_like(x)
    visited = [(e, len(list(group))) for e, group in groupby(pairs, key=lambda pair: pair[0])]
    chosen, token = torch.tensor([[i, i // k] for _, i in pairs], dtype=torch.int64).unbind(1)
    gate, up = _each(x.index_select(0, token), gate_up, visited).chunk(2, -1)
    hidden = F.silu(gate).mul_(up).mul_(weights.flatten().index_select(0, chosen)[:, None])
    answers = _each(hidden, down, visited).to(x.dtype)  # autocast returns its own dtype
    return torch.zeros_like(x).index_add_(0, token, answers)


def _each(rows: Tensor, weight: Tensor, visited: list[tuple[int, int]]) -> Tensor:
    """Rows sorted by expert through their experts' matrices: [M,K], [E,N,K] → [M,N]."""
    parts = rows.split([n for _, n in visited])
    return torch.cat([linear(part, weight[e].to(rows.dtype)) for part, (e, _) in zip(parts, visited, strict=True)])
