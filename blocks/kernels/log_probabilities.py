"""Log-probabilities of given tokens from hidden states, without materialising all logits.

Not supported: second derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockwright.blocks.kernels.cross_entropy import IGNORED, LogitChunk, chunk_shape, outside, wide_dtype


class _LinearLogProbabilities(torch.autograd.Function):
    """Chunk by chunk, as the loss (``cross_entropy``). But the gradient of a token is known in the backward pass only,
    so that computes the logits again, rather than keeping them: no more than a chunk of them is in memory at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        kept: Tensor | None,
        softcap: float | None,
        temperature: float,
    ) -> Tensor:
        logp = torch.empty(len(targets), dtype=wide_dtype(hidden), device=hidden.device)
        chunks = _Chunks(hidden, weight, targets, kept, softcap, temperature)
        for at, part, aim, among in chunks:
            norms, at_aim = chunks.logits.normalise(part, aim, chunks.blocks, among)
            logp[at] = at_aim - torch.stack(norms).logsumexp(0)
        ctx.save_for_backward(hidden, weight, targets, kept)
        ctx.settings = softcap, temperature
        return logp.masked_fill_((targets != IGNORED) & outside(targets, weight), torch.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, kept = ctx.saved_tensors
        chunks = _Chunks(hidden, weight, targets, kept, *ctx.settings)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        sums = weight.dtype if chunks.rows >= len(hidden) else grad.dtype  # over chunks at least fp32
        by_weight = torch.empty_like(weight, dtype=sums) if ctx.needs_input_grad[1] else None
        for at, part, aim, among in chunks:
            norms, _ = chunks.logits.normalise(part, aim, chunks.blocks, among)
            norm, into = torch.stack(norms).logsumexp(0), None if by_hidden is None else by_hidden[at]
            given = (part, aim, -grad[at], norms, norm, 0.0, chunks.blocks)
            chunks.logits.gradients(*given, into, by_weight, fresh=at.start == 0, kept=among)
        return by_hidden, None if by_weight is None else by_weight.to(weight.dtype), None, None, None, None


class _Chunks:
    """Tokens in chunks: which, their hidden states and targets, and the kept (row, token) of each chunk."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        kept: Tensor | None,
        softcap: float | None,
        temperature: float,
    ) -> None:
        self.hidden, self.targets, self.kept = hidden, targets, kept
        self.rows, columns = chunk_shape(len(hidden), len(weight), hidden)
        self.blocks = weight.split(columns)
        self.logits = LogitChunk(hidden, self.rows, columns, softcap, temperature)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        for start in range(0, len(self.hidden), self.rows):
            at, among = slice(start, start + self.rows), None
            if self.kept is not None:
                inside = (self.kept[0] >= start) & (self.kept[0] < start + self.rows)
                among = self.kept[:, inside] - self.kept.new_tensor([[start], [0]])
            yield at, self.hidden[at], self.targets[at], among


def linear_log_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> Tensor:
    """log softmax(logits / temperature)[target] of each token, logits = hidden · weightᵀ.

    Sums over the vocabulary and over tokens are at least fp32.

    Args:
        hidden: [T,D]
        weight: [V,D], the output head
        targets: [T] int64
        softcap: bound of the logits, by a tanh
        temperature: divides the bounded logits
        kept: [2,n] int64, (place, token) of [T,V] that the softmax is over, each target among them; None for all

    Returns:
        [T] in nats, fp32 (fp64 for fp64 input)
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearLogProbabilities.apply(hidden, weight, targets, kept, softcap, temperature)


def linear_log_probabilities_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    temperature: float = 1.0,
    kept: Tensor | None = None,
) -> Tensor:
    """``linear_log_probabilities`` with all logits at once."""
    logits = (hidden @ weight.t()).to(wide_dtype(hidden))
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    logits = logits / temperature
    if kept is not None:
        left_out = torch.ones_like(logits, dtype=torch.bool)
        left_out[kept[0], kept[1]] = False
        logits = logits.masked_fill(left_out, -math.inf)
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
