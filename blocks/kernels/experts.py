"""Σ over a token's chosen experts of weight · SwiGLU_e(x)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.kernels.grouped_matmul import Order, combine, dispatch, grouped_matmul, sort_by_expert
from blockwright.blocks.kernels.seam import capability_of, kernel


class Choices(NamedTuple):
    """Expert choices of each token.

    experts: [T,k] int64; E means no expert
    weights: [T,k]; 0 where there is no expert, and their gradient is of no use there
    pairs: at most how many entries of ``experts`` are below E; None: T·k
    """

    experts: Tensor
    weights: Tensor
    pairs: int | None = None


def is_grouped(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> bool:
    """Whether torch has a kernel for grouped products: on a GPU for bf16, of compute capability 9 and 10. Elsewhere its
    own way is a loop over experts, for which the host waits (A100: pytorch#186620; consumer cards: #184334)."""
    half = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cuda")
    return not x.is_cuda or (half and capability_of(x.device)[0] in (0, 9, 10))


@kernel("experts", "grouped", capability=(9, 0), takes=is_grouped, order=20)
def swiglu_experts(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """By grouped products, without synchronising with the device.

    Args:
        x: [T,D]
        choices: of its tokens
        gate_up: [E,2F,D], gate rows first
        down: [E,D,F]

    Returns:
        [T,D]
    """
    order, weights = in_order(choices, len(gate_up))
    gate, up = grouped_matmul(dispatch(x, order), gate_up.to(x.dtype), order.ends).chunk(2, -1)
    hidden = F.silu(gate) * up * weights.to(gate.dtype)[:, None]
    return combine(grouped_matmul(hidden, down.to(x.dtype), order.ends), order)


# The same call by another name, for the cost card: on older GPUs and in other dtypes, torch loops over experts, and the
# host waits for it.
kernel("experts", "loop", order=30)(swiglu_experts)


def in_order(choices: Choices, n_experts: int) -> tuple[Order, Tensor]:
    """The order of (token, choice) pairs by expert, and their weights in it, [M]."""
    order = sort_by_expert(choices.experts, n_experts, choices.pairs)
    return order, choices.weights.flatten().index_select(0, order.sorted)
