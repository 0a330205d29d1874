"""Expert parallelism by DeepEP (DeepSeek-AI 2025, github.com/deepseek-ai/DeepEP, package ``deep_ep``): NVLink and RDMA.

Not run by this project so far, for want of GPUs: tests compare its calls with the signatures of ``deep_ep.Buffer`` 2.1,
and their order and gradients with an imitation that sends by gloo (tests/training/parallel/test_exchange.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from blockwright.training.parallel.exchange.all_to_all import Exchange, Received

SENT = torch.bfloat16  # the library sends no wider states


class Handle(NamedTuple):
    """The library's own, with its buffer; and the dtype of the tokens."""

    buffer: Any
    layout: tuple[Any, ...]
    dtype: torch.dtype


class DeepEP(Exchange):
    """Its high-throughput kernels, for training. States travel in bfloat16 whatever the precision of the run.

    Its host waits for the device once, inside ``dispatch``, for the counts of rows received.
    """

    def send(self, x: Tensor, rank: Tensor, number: Tensor, weights: Tensor) -> Received:
        asked = (rank * self.held + number).masked_fill(rank == self.ranks, -1)
        buffer = buffer_of(self.group, x.shape[1] * SENT.itemsize)
        handle: list[Any] = []
        rows, numbers, shares = _Send.apply(x.to(SENT), weights.float(), asked, buffer, self.ranks * self.held, handle)
        (layout, pairs) = handle
        experts = numbers.long().masked_fill(numbers < 0, self.held)
        return Received(rows.to(x.dtype), experts, shares, pairs, Handle(buffer, layout, x.dtype))

    def give_back(self, answers: Tensor, handle: Handle) -> Tensor:
        found: Tensor = _GiveBack.apply(answers.to(SENT), handle.buffer, handle.layout)
        return found.to(handle.dtype)


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, asked: Tensor, buffer: Any, n_experts: int, handle: list[Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        a_rank, a_node, an_expert, reached, _ = buffer.get_dispatch_layout(asked, n_experts)
        rows, numbers, shares, counts, layout, _ = buffer.dispatch(
            x.contiguous(),
            num_tokens_per_rank=a_rank,
            num_tokens_per_rdma_rank=a_node,
            is_token_in_rank=reached,
            num_tokens_per_expert=an_expert,
            topk_idx=asked,
            topk_weights=weights.contiguous(),
        )
        handle += [layout, sum(counts)]
        ctx.buffer, ctx.layout = buffer, layout
        ctx.mark_non_differentiable(numbers)
        return rows, numbers, shares

    @staticmethod
    def backward(ctx: Any, to_rows: Tensor, _: Tensor, to_shares: Tensor) -> tuple[Tensor | None, ...]:
        to_x, to_weights, _ = ctx.buffer.combine(to_rows.contiguous(), ctx.layout, topk_weights=to_shares.contiguous())
        return to_x, to_weights, None, None, None, None


class _GiveBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, answers: Tensor, buffer: Any, layout: tuple[Any, ...]) -> Tensor:
        ctx.buffer, ctx.layout = buffer, layout
        found: Tensor = buffer.combine(answers.contiguous(), layout)[0]
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.buffer.dispatch(grad.contiguous(), handle=ctx.layout)[0], None, None


@cache
def buffer_of(group: ProcessGroup, row: int) -> Any:
    """One buffer for all layers, as large as the library asks for rows of so many bytes."""
    from deep_ep import Buffer

    n = group.size()
    configs = Buffer.get_dispatch_config(n), Buffer.get_combine_config(n)
    near, far = (
        max(getattr(config, f"get_{link}_buffer_size_hint")(row, n) for config in configs) for link in ("nvl", "rdma")
    )
    return Buffer(group, near, far)
