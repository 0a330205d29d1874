"""Σ over a token's chosen experts of weight · SwiGLU_e(x), on a CPU and on other devices."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from blockwright.blocks.kernels.few_experts import few, few_swiglu
from blockwright.blocks.kernels.grouped_matmul import Order, sort_by_expert
from blockwright.blocks.kernels.grouped_swiglu import grouped_swiglu, grouped_swiglu_reference
from blockwright.blocks.kernels.seam import kernel


class Choices(NamedTuple):
    """Expert choices of each token.

    experts: [T,k] int64; E means no expert
    weights: [T,k]; 0 where there is no expert, and their gradient is of no use there
    pairs: at most how many entries of ``experts`` are below E; None: T·k
    """

    experts: Tensor
    weights: Tensor
    pairs: int | None = None


@kernel("experts", "segments", devices=("cpu", "cuda"), automatic=("cpu",), order=10)
def swiglu_experts_on_cpu(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """For few pairs, one expert at a time; else in one pass over the sorted tokens.

    Args:
        x: [T,D]
        choices: of its tokens
        gate_up: [E,2F,D], gate rows first
        down: [E,D,F]

    Returns:
        [T,D]
    """
    if few(choices.experts):
        return few_swiglu(x, choices.experts, choices.weights, gate_up, down)
    order, weights = _sorted(choices, len(gate_up))
    return grouped_swiglu(x, weights, gate_up.to(x.dtype), down.to(x.dtype), order)


def is_grouped(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> bool:
    """Whether torch has a kernel for grouped products of this dtype; on a GPU it has one for bf16."""
    return not x.is_cuda or x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cuda")


@kernel("experts", "grouped", capability=(9, 0), takes=is_grouped, order=20)
def swiglu_experts(x: Tensor, choices: Choices, gate_up: Tensor, down: Tensor) -> Tensor:
    """The same with grouped products, without synchronising with the device."""
    order, weights = _sorted(choices, len(gate_up))
    return grouped_swiglu_reference(x, weights, gate_up.to(x.dtype), down.to(x.dtype), order)


# The same call by another name, for the cost card: on older GPUs and in other dtypes, torch loops over experts, and the
# host waits for it.
kernel("experts", "loop", order=30)(swiglu_experts)


def _sorted(choices: Choices, n_experts: int) -> tuple[Order, Tensor]:
    order = sort_by_expert(choices.experts, n_experts, choices.pairs)
    return order, choices.weights.flatten().index_select(0, order.sorted)
