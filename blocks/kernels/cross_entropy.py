"""Next-token loss from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a target that is not scored, as torch's own cross entropy has it
CHUNK_ELEMENTS = 1 << 22  # logits held at once: 16 MiB of fp32


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are formed chunk by chunk in the forward pass, while the chunk's logits are at hand."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, learn: bool, softcap: float | None
    ) -> Tensor:
        grad_hidden = torch.empty_like(hidden) if learn else None
        grad_weight = torch.zeros_like(weight, dtype=_wide(weight)) if learn else None
        total = torch.zeros((), dtype=_wide(hidden), device=hidden.device)
        for start in range(0, hidden.shape[0], rows):
            part, aim = hidden[start : start + rows], targets[start : start + rows]
            logits = (part @ weight.t()).to(total.dtype)
            if softcap is not None:
                logits = softcap * (logits / softcap).tanh()
                slope = 1 - (logits / softcap).square()
            log_probs = logits.log_softmax(-1)
            total += F.nll_loss(log_probs, aim, ignore_index=IGNORED, reduction="sum")
            if grad_hidden is not None and grad_weight is not None:
                grad = log_probs.exp_()
                scored = aim != IGNORED
                grad[torch.arange(len(aim), device=aim.device), aim.clamp(min=0)] -= 1
                grad = grad if softcap is None else grad * slope
                grad = (grad * scored[:, None]).to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[start : start + rows])
                grad_weight += grad.t() @ part
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.dtype), None, None, None, None


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Summed negative log-likelihood of the targets under softmax(hidden · weightᵀ).

    Args:
        hidden: [T,D]
        weight: [V,D], the output head
        targets: [T] int64; ``IGNORED`` where nothing is to be predicted
        softcap: bound that a tanh keeps the logits within

    Returns:
        scalar in nats, fp32 (fp64 for fp64 input): the sum over scored targets
    """
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    learn = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)  # forward() cannot see no_grad
    return _LinearCrossEntropy.apply(hidden, weight, targets, rows, learn, softcap)


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """The same, with all logits at once."""
    logits = (hidden @ weight.t()).to(_wide(hidden))
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
