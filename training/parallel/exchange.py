"""What expert parallelism sends: tokens go to the ranks that hold their experts, and their sums come back.

By torch's all-to-all on any device, or by DeepEP over NVLink and RDMA (DeepSeek-AI 2025, github.com/deepseek-ai/DeepEP,
package ``deep_ep``). DeepEP was not run by this project so far, for want of GPUs: tests compare its calls with the
signatures of ``deep_ep.Buffer`` 2.1, and their order and gradients with an imitation that sends by gloo
(tests/training/parallel/test_exchange.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from blockwright.blocks.kernels.grouped_matmul import add_up, take
from blockwright.training.parallel.collectives import exchange, exchange_counts


class Received(NamedTuple):
    """The tokens that came to this rank.

    rows: [R,D] token states
    experts: [R,k] int64, this rank's experts that each is for, from 0; ``held`` for none
    weights: [R,k] fp32, factors on these experts' outputs
    pairs: how many entries of ``experts`` are below ``held``, at most
    handle: what ``give_back`` needs to know
    """

    rows: Tensor
    experts: Tensor
    weights: Tensor
    pairs: int
    handle: Any


class Exchange(ABC):
    """A way of sending. Gradients of states and weights pass both ways.

    Args:
        group: the ranks
        ranks: their number, n
        held: experts of each
    """

    def __init__(self, group: ProcessGroup, ranks: int, held: int) -> None:
        self.group, self.ranks, self.held = group, ranks, held

    @abstractmethod
    def send(self, x: Tensor, rank: Tensor, number: Tensor, weights: Tensor) -> Received:
        """Send each token once to each rank that holds any of its experts.

        Args:
            x: [T,D]
            rank: [T,k] of the rank that holds each expert of a token; n for no expert
            number: [T,k] of the expert on that rank, from 0
            weights: [T,k] fp32
        """

    @abstractmethod
    def give_back(self, answers: Tensor, handle: Any) -> Tensor:
        """Rows [R,D] that belong to the received ones → for each token the sum of its rows, [T,D]."""


class Handle(NamedTuple):
    """Rows sent to each rank and received from each; the token of each row sent; the tokens."""

    sent: list[int]
    received: list[int]
    token: Tensor
    x: Tensor


class AllToAll(Exchange):
    """Two exchanges of exactly as many rows as are needed.

    The host waits for the device once, for the counts of rows sent and received.
    """

    def send(self, x: Tensor, rank: Tensor, number: Tensor, weights: Tensor) -> Received:
        n = self.ranks
        reached = torch.zeros(len(x), n + 1, dtype=torch.bool, device=x.device).scatter_(1, rank, True)[:, :n]
        asked_of = torch.zeros(n + 1, dtype=torch.int64, device=x.device)
        asked_of.scatter_add_(0, rank.flatten(), torch.ones_like(rank).flatten())
        counts = torch.stack((reached.sum(0), asked_of[:n]), 1)
        sent, received, pairs = torch.cat((counts[:, :1], exchange_counts(counts, self.group)), 1).t().tolist()
        rows = (~reached.t()).flatten().to(torch.uint8).argsort(stable=True)[: sum(sent)]  # by rank, then by token
        to, token = rows // len(x), rows % len(x)
        absent = rank[token] != to[:, None]
        numbers, order = number[token].masked_fill(absent, self.held).sort(1)
        shares = take(weights, token).gather(1, order).masked_fill(numbers == self.held, 0)
        width = min(numbers.shape[1], self.held)  # a row has at most as many experts as the rank holds
        note = torch.cat((numbers[:, :width].float(), shares[:, :width].float()), 1)
        rows, note = exchange(received, sent, self.group, take(x, token), note)
        asked, share = note.chunk(2, 1)
        return Received(rows, asked.detach().round().long(), share, sum(pairs), Handle(sent, received, token, x))

    def give_back(self, answers: Tensor, handle: Handle) -> Tensor:
        (back,) = exchange(handle.sent, handle.received, self.group, answers)
        return add_up(back.to(handle.x.dtype), handle.token, len(handle.x))


SENT = torch.bfloat16  # the library sends no wider states


class DeepHandle(NamedTuple):
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
        return Received(rows.to(x.dtype), experts, shares, pairs, DeepHandle(buffer, layout, x.dtype))

    def give_back(self, answers: Tensor, handle: DeepHandle) -> Tensor:
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
