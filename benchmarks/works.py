"""Functions for timing kernels: experts, attention, the loss; ours and alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.models.base import DTYPES
from benchmarks.stopwatch import Work
from blockwright.blocks.experts import SwiGLUExperts
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.cross_entropy import linear_cross_entropy
from blockwright.blocks.kernels.scoring import Scoring

D_MODEL, WIDTH = 512, 256  # of the experts
EXPERTS = ("ours", "one dense product", "transformers eager loop", "transformers grouped_mm", "padded bmm")


def training(outputs: Any, *inputs: Tensor) -> Work:
    """Forward and backward of a function, with gradients of all inputs, for a random output gradient."""
    grad: list[Tensor] = []

    def work() -> None:
        y = outputs()
        if not grad:
            grad.append(torch.randn_like(y))
        y.backward(grad[0])
        for x in inputs:
            x.grad = None

    return work


def grouped_experts(cell: Sequence[int], dtype: str, device: str) -> tuple[dict[str, Work], float]:
    """Forward and backward of E SwiGLU experts with the same routing, and of one dense product with equal FLOPs.

    Args:
        cell: E, k and the tokens T, each routed to k random experts
        dtype, device: of weights and tokens

    Returns:
        the functions, and their FLOPs
    """
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    n_experts, top_k, tokens = cell
    ours = SwiGLUExperts(D_MODEL, n_experts, WIDTH)
    for p in ours.parameters():
        nn.init.normal_(p, std=0.02)
    ours.to(device, kind)
    x = torch.randn(tokens, D_MODEL, device=device).to(kind).requires_grad_()
    scores = torch.rand(tokens, n_experts, device=device)
    experts = scores.topk(top_k).indices
    weights = torch.full((tokens, top_k), 1 / top_k, device=device, requires_grad=True)
    load = torch.bincount(experts.flatten(), minlength=n_experts).float()
    routing = Routing(experts, weights, scores, {}, load)
    learned = (x, weights, *ours.parameters())
    rows = torch.randn(tokens * top_k, D_MODEL, device=device).to(kind).requires_grad_()
    matrix = torch.randn(3 * WIDTH, D_MODEL, device=device).to(kind).requires_grad_()
    works = {
        "ours": training(lambda: ours(x, routing), *learned),
        "one dense product": training(lambda: F.linear(rows, matrix), rows, matrix),
        "padded bmm": training(lambda: _padded(x, ours, experts, weights), *learned),
    }
    theirs = _transformers_experts(ours, n_experts, top_k)
    for name, implementation in (("eager loop", "eager"), ("grouped_mm", "grouped_mm")):
        works[f"transformers {name}"] = training(
            lambda kind=implementation: _by(theirs, kind, x, experts, weights),
            *learned,
        )
    return {name: works[name] for name in EXPERTS}, 3 * 2 * rows.numel() * 3 * WIDTH


def _transformers_experts(ours: SwiGLUExperts, n_experts: int, top_k: int) -> Any:
    """transformers' experts on our parameters."""
    from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts

    config = DeepseekV3Config(
        hidden_size=D_MODEL, moe_intermediate_size=WIDTH, n_routed_experts=n_experts, num_experts_per_tok=top_k
    )
    with torch.device("meta"):
        theirs = DeepseekV3Experts(config)
    theirs.gate_up_proj, theirs.down_proj = ours.gate_up, ours.down
    return theirs


def _by(theirs: Any, implementation: str, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    theirs.config._experts_implementation = implementation
    return theirs(x, experts, weights.to(x.dtype))


def _padded(x: Tensor, ours: SwiGLUExperts, experts: Tensor, weights: Tensor) -> Tensor:
    """One batched product with every expert's rows padded to the maximum."""
    T, k = experts.shape
    E = ours.n_experts
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=E)
    room = int(counts.max())
    starts = counts.cumsum(0) - counts
    place = flat[order] * room + torch.arange(T * k, device=x.device) - starts[flat[order]]
    rows = x.new_zeros(E * room, x.shape[1]).index_copy(0, place, x.index_select(0, order // k)).view(E, room, -1)
    gate, up = torch.bmm(rows, ours.gate_up.transpose(1, 2)).chunk(2, -1)
    out = torch.bmm(F.silu(gate) * up, ours.down.transpose(1, 2)).flatten(0, 1).index_select(0, place)
    out = out * weights.flatten()[order, None].to(out.dtype)
    return torch.zeros_like(x).index_add(0, order // k, out)


def attention(cell: Sequence[int], dtype: str, device: str) -> tuple[dict[str, Work], float]:
    """Causal attention forward and backward: ours, SDPA with unequal widths, SDPA with padded values, with a mask.

    Args:
        cell: rows, length, heads, width of keys, width of values
        dtype, device: of all tensors

    Returns:
        the functions, and their FLOPs: half of all scores, the backward pass two and a half times the forward
    """
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    batch, length, heads, key, value = cell
    q, k = (torch.randn(batch, length, heads, key, device=device).to(kind).requires_grad_() for _ in range(2))
    v = torch.randn(batch, length, heads, value, device=device).to(kind).requires_grad_()
    scale = key**-0.5
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()

    def sdpa(padded: bool, **how: Any) -> Tensor:
        values = F.pad(v, (0, key - value)) if padded else v
        a, b, c = (t.transpose(1, 2) for t in (q, k, values))
        y = F.scaled_dot_product_attention(a, b, c, scale=scale, **how)
        return y.transpose(1, 2)[..., :value]

    works = {
        "ours": lambda: Kernels().attend(q, k, v, Scoring(scale)),
        "SDPA": lambda: sdpa(False, is_causal=True),
        "SDPA, values padded": lambda: sdpa(True, is_causal=True),
        "SDPA, boolean mask": lambda: sdpa(True, attn_mask=mask),
    }
    flops = 3.5 * 2 * batch * heads * length**2 / 2 * (key + value)
    return {name: training(work, q, k, v) for name, work in works.items()}, flops


def loss(tokens: int, vocabulary: int, dtype: str, device: str) -> tuple[dict[str, Work], float]:
    """Next-token loss from hidden states, forward and backward: ours, and all logits at once.

    Returns:
        the functions, and their FLOPs
    """
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    hidden = torch.randn(tokens, D_MODEL, device=device).to(kind).requires_grad_()
    head = (0.02 * torch.randn(vocabulary, D_MODEL, device=device)).to(kind).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), device=device)
    works = {
        "ours": lambda: linear_cross_entropy(hidden, head, targets)[0] / tokens,
        "logits held whole": lambda: F.cross_entropy(F.linear(hidden, head).float(), targets),
    }
    return {name: training(work, hidden, head) for name, work in works.items()}, 6 * tokens * vocabulary * D_MODEL
