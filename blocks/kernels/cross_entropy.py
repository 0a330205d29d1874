"""Next-token loss from hidden states, without materialising all logits.

Not supported: label smoothing, class weights, second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from blockwright.blocks.kernels.seam import kernel

IGNORED = -100  # an unscored target, as in torch's cross entropy
CHUNK_ELEMENTS = 1 << 22  # logits per chunk: 16 MiB of fp32
GPU_CHUNKS = 16  # larger chunks on a GPU, to use it fully
ROWS = 128  # minimum tokens per chunk in fp32, twice that in bf16; below, the vocabulary is split too
BLOCK_ROWS = 512  # tokens per chunk when the vocabulary is split


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are computed chunk by chunk in the forward pass, while the chunk's logits are available.

    A chunk is some tokens against the vocabulary. If that would leave too few tokens, it is some tokens against blocks
    of the vocabulary: first the sum of exponentials over all blocks, then the logits again for the gradient, starting
    with the last block, whose logits still exist. Four products instead of three.

    Token weights are multiplied in where tensors are D wide, not V.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        softcap: float | None,
        z_loss: float,
        learn: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        tokens, wide = hidden.shape[0], wide_dtype(hidden)
        rows, columns = chunk_shape(tokens, weight.shape[0], hidden)
        blocks = weight.split(columns)
        chunk = LogitChunk(hidden, rows, columns, softcap)
        scored = targets != IGNORED
        share = scored.to(wide).masked_fill_(scored & outside(targets, weight), torch.nan)  # such a sum is no figure
        share = share if weights is None else share * weights.to(wide)
        grad_hidden = torch.empty_like(hidden) if learn[0] else None
        # Accumulated over chunks in fp32; for a single chunk the product itself has done so.
        sums = weight.dtype if rows >= tokens else wide
        grad_weight = torch.empty_like(weight, dtype=sums) if learn[1] else None
        total, z = (torch.zeros((), dtype=wide, device=hidden.device) for _ in range(2))
        for start in range(0, tokens, rows):
            part, aim, own = (x[start : start + rows] for x in (hidden, targets, share))
            norms, at_aim = chunk.normalise(part, aim, blocks)
            norm = torch.stack(norms).logsumexp(0) if len(norms) > 1 else norms[0]
            squared = (own * norm.square()).sum()
            total += (own * (norm - at_aim)).sum() + z_loss * squared
            z += squared
            if not any(learn):
                continue
            into = None if grad_hidden is None else grad_hidden[start : start + rows]
            chunk.gradients(part, aim, own, norms, norm, z_loss, blocks, into, grad_weight, fresh=start == 0)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(z)
        return total, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        # [V,D] in fp32 is large: no second one, unless the graph is kept for another pass.
        scale = torch.mul if torch._C._autograd._get_current_graph_task_keep_graph() else Tensor.mul_
        by_hidden = None if grad_hidden is None else scale(grad_hidden, grad)
        by_weight = None if grad_weight is None else scale(grad_weight, grad).to(ctx.dtype)
        return by_hidden, by_weight, None, None, None, None, None


class LogitChunk:
    """The logits of some tokens against a block of the vocabulary, in buffers reused by every chunk.

    Args:
        hidden: [T,D], from which chunks are taken
        rows, columns: maximum size of a chunk
        softcap: bound of the logits
        temperature: divides them, after the bound
    """

    def __init__(
        self, hidden: Tensor, rows: int, columns: int, softcap: float | None, temperature: float = 1.0
    ) -> None:
        wide = wide_dtype(hidden)
        self.softcap, self.temperature = softcap, temperature
        self.product = hidden.new_empty(rows * columns)  # dtype of the matrix products
        self.scores = self.product if hidden.dtype == wide else hidden.new_empty(rows * columns, dtype=wide)
        self.tanh = None if softcap is None else torch.empty_like(self.scores)

    def normalise(
        self, part: Tensor, aim: Tensor, blocks: tuple[Tensor, ...], kept: Tensor | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """log Σ exp of the logits over each block, and the logit of the target, all [R]; the buffer then holds the last
        block's probabilities, normalised over that block only. ``kept``, [2,n], are the (row, token) that have any
        probability; None for all."""
        norms: list[Tensor] = []
        at_aim = torch.zeros(len(part), dtype=self.scores.dtype, device=part.device)
        first = 0
        for block in blocks:
            scores = self._logits(part, block, first, kept)
            column, inside = _within(aim, first, len(block))
            at_aim += scores.gather(1, column).squeeze(1) * inside
            norms.append(_softmax(scores))
            first += len(block)
        return norms, at_aim

    def gradients(
        self,
        part: Tensor,
        aim: Tensor,
        share: Tensor,
        norms: list[Tensor],
        norm: Tensor,
        z_loss: float,
        blocks: tuple[Tensor, ...],
        grad_hidden: Tensor | None,
        grad_weight: Tensor | None,
        fresh: bool,
        kept: Tensor | None = None,
    ) -> None:
        """Write the gradient with respect to hidden states, and add that of the weight (``fresh``: write it).

        d/dlogits = w [(1 + 2 z_loss log Z) softmax − onehot(target)] / temperature for each token.
        """
        share = share / self.temperature
        shared = (part * share[:, None]).to(part.dtype)
        # Over several blocks, the sum of bf16 products is accumulated in fp32.
        several = len(blocks) > 1 and grad_hidden is not None
        by_hidden = torch.empty_like(grad_hidden, dtype=self.scores.dtype) if several else grad_hidden  # type: ignore[arg-type]
        first = sum(map(len, blocks))
        for i in reversed(range(len(blocks))):
            block, last = blocks[i], i == len(blocks) - 1
            first -= len(block)
            scores = self._view(self.scores, part, block)
            if not last:
                _softmax(self._logits(part, block, first, kept))
            if len(blocks) > 1 or z_loss:
                scores *= ((norms[i] - norm).exp() * (1 + 2 * z_loss * norm))[:, None]
            column, inside = _within(aim, first, len(block))
            scores.scatter_add_(1, column, -inside[:, None].to(scores.dtype))
            if self.tanh is not None:
                slope = self._view(self.tanh, part, block).square_()
                scores.addcmul_(scores, slope, value=-1)
            grad = self._view(self.product, part, block)
            if grad.dtype != scores.dtype:
                grad.copy_(scores)
            if by_hidden is not None:
                _product(grad, block, by_hidden, fresh=last)
            if grad_weight is not None:
                _product(grad.t(), shared, grad_weight[first : first + len(block)], fresh)
        if grad_hidden is not None and by_hidden is not None:
            torch.mul(by_hidden, share[:, None].to(by_hidden.dtype), out=by_hidden)
            if several:
                grad_hidden.copy_(by_hidden)

    def _logits(self, part: Tensor, block: Tensor, first: int, kept: Tensor | None) -> Tensor:
        product, scores = self._view(self.product, part, block), self._view(self.scores, part, block)
        torch.mm(part, block.t(), out=product)
        if product.dtype != scores.dtype:
            scores.copy_(product)
        if self.softcap is not None and self.tanh is not None:
            tanh = torch.div(scores, self.softcap, out=self._view(self.tanh, part, block)).tanh_()
            torch.mul(tanh, self.softcap, out=scores)
        if self.temperature != 1:
            scores /= self.temperature
        return scores if kept is None else _keep(scores, kept, first)

    @staticmethod
    def _view(buffer: Tensor, part: Tensor, block: Tensor) -> Tensor:
        return buffer[: len(part) * len(block)].view(len(part), len(block))


def _keep(scores: Tensor, kept: Tensor, first: int) -> Tensor:
    """Leave only some logits [R,C] of a block that begins at token ``first``: (row, token) are in ``kept``.

    The others become the least finite number, not −∞: a block of which a row keeps nothing has no weight, but no NaN.
    """
    rows, tokens = kept[:, (kept[1] >= first) & (kept[1] < first + scores.shape[1])]
    at = (rows, tokens - first)
    values = scores[at]
    scores.fill_(torch.finfo(scores.dtype).min)
    scores[at] = values
    return scores


def _softmax(scores: Tensor) -> Tensor:
    """Convert logits [R,V] to probabilities in place; returns log Σ exp, [R].

    The largest probability is 1 / Σ exp(logit − largest logit), so the sum need not be computed again.
    """
    largest = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    return largest - scores.amax(-1).log()


def _within(aim: Tensor, first: int, length: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a block starting at ``first``, [R,1], and whether it is in the block, [R]."""
    column = aim - first
    inside = (column >= 0) & (column < length)
    return column.clamp(0, length - 1)[:, None], inside


def _product(a: Tensor, b: Tensor, into: Tensor, fresh: bool) -> None:
    """into ← a b, or into += a b; in the precision of ``into``."""
    if into.dtype == a.dtype:
        into.addmm_(a, b, beta=0 if fresh else 1)
    elif fresh:
        into.copy_(a @ b)
    else:
        into += a @ b


def outside(targets: Tensor, weight: Tensor) -> Tensor:
    """Which of the targets the vocabulary [V,D] has not."""
    return targets.clamp(0, weight.shape[0] - 1) != targets


def chunk_shape(tokens: int, vocabulary: int, like: Tensor) -> tuple[int, int]:
    """Tokens and vocabulary columns of a chunk; ``like`` has the device and dtype."""
    elements = CHUNK_ELEMENTS * (1 if like.device.type == "cpu" else GPU_CHUNKS)
    rows = elements // vocabulary
    # Accumulating bf16 products over chunks is one more pass over [V,D] for each: use fewer, larger chunks.
    if rows >= min(tokens, ROWS if like.dtype == wide_dtype(like) else 2 * ROWS):
        return max(1, min(tokens, rows)), vocabulary
    rows = max(1, min(tokens, BLOCK_ROWS, elements))
    return rows, min(vocabulary, max(1, elements // rows))


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over the vocabulary."""
    return torch.promote_types(x.dtype, torch.float32)


@kernel("cross_entropy", "chunked", order=20)
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    z_loss: float = 0.0,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Summed negative log-likelihood of the targets under softmax(logits), logits = hidden · weightᵀ.

    Σ_t w_t (log Z_t − logit_t[target] + z_loss · log² Z_t), Z_t = Σ_v exp(logit_t[v])

    The z_loss term keeps log Z near 0; PaLM, arXiv 2204.02311 §5, has z_loss = 1e-4. Sums over the vocabulary and over
    tokens are at least fp32.

    Args:
        hidden: [T,D]
        weight: [V,D], the output head
        targets: [T] int64; ``IGNORED`` for unscored tokens. One that is no id of the vocabulary makes the loss NaN
        softcap: bound of the logits, by a tanh
        z_loss: weight of log² Z
        weights: [T], weight of each token in the sum, without gradient; None for 1

    Returns:
        the sum in nats, and Σ_t w_t log² Z_t alone, without gradient: scalars, fp32 (fp64 for fp64 input). Another
        implementation may return 0 for the second where it is no part of the loss (z_loss = 0), as Liger does
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    on = torch.is_grad_enabled()  # forward() cannot see no_grad
    learn = (on and hidden.requires_grad, on and weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, softcap, z_loss, learn)


@kernel("cross_entropy", "reference", automatic=False, order=30)
def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None = None,
    z_loss: float = 0.0,
    *,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy`` with all logits at once."""
    logits = (hidden @ weight.t()).to(wide_dtype(hidden))
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    squares = logits.logsumexp(-1).square() * (targets != IGNORED)
    losses, squares = (x if weights is None else x * weights for x in (losses, squares))
    return (losses + z_loss * squares).sum(), squares.detach().sum()
