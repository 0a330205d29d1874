"""Dynamically composed heads are the paper's: a matrix over the heads for every pair, here built pair by pair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.forward_pass import Pass
from tests.blocks.small import D, Make, drawn, gradients, near, order

T, N, H = 7, 4, 12
NODE = {"name": "gqa", "n_heads": N, "n_kv_heads": 2, "scores": {"name": "dcmha", "rank": 3, "width": 5}}
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * T])
POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], list(range(T))])


def compositions(parts: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and w [2,R,N] and g [2,N] of one token x [D]."""
    hidden = F.gelu(parts.hidden.weight @ x).view(2, -1)
    both = (to.mT.unflatten(-1, (-1, N)) for to in (parts.read, parts.written))
    p, w = (torch.stack([(hidden[c] @ to[c].flatten(1)).view(to.shape[2:]) for c in (0, 1)]) for to in both)
    return p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt(), w, (parts.gate.weight @ x).tanh().view(2, -1)


def matrix(block: Any, of_query: Tensor, of_key: Tensor, when: int) -> Tensor:
    """[N,N], by which what the heads score of a pair is multiplied: from head j to head i."""
    found = torch.eye(N, dtype=of_query.dtype)
    for parts, x in ((block.scores.of_query, of_query), (block.scores.of_key, of_key)):
        p, w, gate = (t[when] for t in compositions(parts, x))
        found = found + w.T @ p + gate.diag()
    return found


def slow(block: Any, x: Tensor) -> Tensor:
    """[B,T,N,H], one query after the other."""
    q, k, v = (W(x).unflatten(-1, (-1, H)) for W in (block.query, block.key, block.value))
    slopes, y = block.position.slopes(x.device).to(x.dtype), torch.zeros_like(q)
    for b in range(len(x)):
        for t in range(T):
            seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
            scores = torch.stack([(q[b, t] * k[b, s].repeat_interleave(2, 0)).sum(-1) for s in seen], 1) / H**0.5
            scores = torch.stack([matrix(block, x[b, t], x[b, s], 0) @ scores[:, i] for i, s in enumerate(seen)], 1)
            weights = (scores + torch.stack([-slopes * (t - s) for s in seen], 1)).softmax(-1)
            weights = torch.stack([matrix(block, x[b, t], x[b, s], 1) @ weights[:, i] for i, s in enumerate(seen)], 1)
            for i, s in enumerate(seen):
                y[b, t] += weights[:, i, None] * v[b, s].repeat_interleave(2, 0)
    return y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
def test_every_pair_has_its_own_matrix_of_heads(make_block: Make, dtype: torch.dtype, tolerance: float) -> None:
    attention = make_block("attention", NODE, around={"position": "alibi"}, dtype=dtype)
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.15, generator=torch.Generator().manual_seed(parameter.numel()))
    x = drawn(2, T, D, dtype=dtype).requires_grad_()
    y, expected = attention(x, Pass(POSITIONS, segments=SEGMENTS)), attention.output(slow(attention, x).flatten(-2))
    near(y, expected, tolerance, tolerance)
    parameters = [x, *attention.parameters()]
    near(gradients(y, parameters), gradients(expected, parameters), tolerance * 10, tolerance * 10)


@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_holds_what_keys_compose(make_block: Make, window: int | None) -> None:
    block = make_block("attention", {**NODE, "name": "sliding_window", "window": window})
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, whole = drawn(2, T, D), block(drawn(2, T, D), Pass(order(T)))
    cache, mark = block.new_cache(2, T, torch.float64, x.device), None
    assert sum(t[0, 0].numel() for t in cache.buffers.values()) == 2 * 2 * H + 2 * (2 * 3 + 1) * N
    for first, last in ((0, 3), (3, 4), (4, 6), (5, 6), (6, 7)):
        if first == 4:
            mark = cache.mark(2)
        elif first == 5:
            cache.rewind(mark, 1)
        y = block(x[:, first:last], Pass(order(last - first, first), cache=cache))
        near(y, whole[:, first:last], 1e-9)


def test_without_written_directions_and_gates_it_is_a_plain_softmax(make_block: Make) -> None:
    block, plain = make_block("attention", NODE), make_block("attention", {**NODE, "scores": None})
    plain.load_state_dict({n: t for n, t in block.state_dict().items() if not n.startswith("scores")})
    for parts in (block.scores.of_query, block.scores.of_key):
        nn.init.zeros_(parts.written)
        nn.init.zeros_(parts.gate.weight)
    near(block(drawn(2, T, D), Pass(order(T))), plain(drawn(2, T, D), Pass(order(T))), 1e-6)
