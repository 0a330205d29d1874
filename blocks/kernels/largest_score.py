"""The largest attention score of each head, noted beside the kernel that attends, where a callback asks for it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.kernels.attention import visible
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.scoring import Scoring, is_real

HELD = 2**22  # scores held at a time


class LargestScores:
    """Notes the largest scores of an attention, in passes for a gradient, until kernels are chosen again."""

    def __init__(self, attention: nn.Module) -> None:
        self._found: Tensor | None = None
        for block in attention.modules():  # a child may attend in its place
            if isinstance(block, Block):
                block.kernels = self._beside(block.kernels)

    def take(self) -> Tensor | None:
        """Those since the last call, [N], fp32 (fp64 for fp64); None if nothing has attended."""
        found, self._found = self._found, None
        return found

    def _beside(self, kernels: Kernels) -> Kernels:
        """The same kernels, with attention that also notes its scores."""

        def attend(q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> Tensor:
            if torch.is_grad_enabled():  # not in a validation, nor while tokens are sampled
                self._note(q.detach(), k.detach(), scoring)
            return kernels.attend(q, k, v, scoring)

        return kernels.attending_by(attend)

    @torch.no_grad()
    def _note(self, q: Tensor, k: Tensor, scoring: Scoring) -> None:
        found = largest_scores(q, k, scoring)
        self._found = found if self._found is None else torch.maximum(self._found, found)


def largest_scores(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """max over queries t, without padding, and keys s that t sees of scale · q_t·k_s, before a softcap and a bias.

    Args:
        q, k, scoring: as in ``blockwright.blocks.kernels.attention.causal_attention``; a bias of −∞ hides a key

    Returns:
        [N], in fp32 (fp64 for fp64)
    """
    known = torch.amp.is_autocast_available(q.device.type)  # which would round the operands of the product
    with torch.autocast(q.device.type, enabled=False) if known else nullcontext():
        return _largest(q, k, scoring)


def _largest(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    (B, T, N, _), (S, K) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).permute(0, 2, 3, 1)  # [B,K,H,S]
    bias = scoring.bias if isinstance(scoring.bias, Tensor) else None  # a formula hides nothing
    rows, found = max(1, HELD // (B * N * S)), []
    for first in range(0, T, rows):
        last = min(first + rows, T)
        seen = S - T + last  # keys up to the last of these queries
        some = q[:, first:last].to(wide).transpose(1, 2).unflatten(1, (K, -1)).flatten(2, 3)
        scores = (some @ keys[..., :seen]).view(B, N, last - first, seen)
        ids = None if scoring.segments is None else scoring.segments[:, :seen]
        mask = visible(last - first, seen, q.device, ids, scoring.window)
        if ids is not None:
            mask = mask & is_real(ids)[:, None, None]  # padding sees padding alone
        if bias is not None:
            mask = mask & (bias[:, :, first:last, :seen] > float("-inf"))
        found.append(scores.masked_fill_(~mask, float("-inf")).amax((0, 2, 3)))
    return torch.stack(found).amax(0) * scoring.scale
