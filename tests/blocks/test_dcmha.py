"""Dynamically composed heads are the paper's: a matrix over the heads for every pair, here built pair by pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.forward_pass import Pass

T, D, N, H = 7, 48, 4, 12
NODE = {"name": "gqa", "n_heads": N, "n_kv_heads": 2, "scores": {"name": "dcmha", "rank": 3, "width": 5}}
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0] * T])


@pytest.fixture
def attention(make_block: Callable[..., Any]) -> Any:
    block = make_block("attention", NODE, around={"position": "alibi"})
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    return block


def compositions(parts: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and w [2,R,N] and g [2,N] of one token x [D]."""
    hidden = F.gelu(parts.hidden.weight @ x).view(2, -1)
    p, w = (torch.stack([(hidden[c] @ to[c].flatten(1)).view(to.shape[2:]) for c in (0, 1)]) for to in parts_of(parts))
    p = p / (p.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return p, w, (parts.gate.weight @ x).tanh().view(2, -1)


def parts_of(parts: Any) -> tuple[Tensor, Tensor]:
    return tuple(to.mT.unflatten(-1, (-1, N)) for to in (parts.read, parts.written))


def matrix(block: Any, of_query: Tensor, of_key: Tensor, when: int) -> Tensor:
    """[N,N], by which what the heads score of a pair is multiplied: from head j to head i."""
    found = torch.eye(N, dtype=of_query.dtype)
    for parts, x in ((block.scores.of_query, of_query), (block.scores.of_key, of_key)):
        p, w, gate = (t[when] for t in compositions(parts, x))
        found = found + w.T @ p + gate.diag()
    return found


def slow(block: Any, x: Tensor, segments: Tensor) -> Tensor:
    """[B,T,N,H], one query after the other."""
    q, k, v = (W(x).unflatten(-1, (-1, H)) for W in (block.query, block.key, block.value))
    slopes, y = block.position.slopes(x.device).to(x.dtype), torch.zeros_like(q)
    for b in range(len(x)):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            scores = torch.stack([(q[b, t] * k[b, s].repeat_interleave(2, 0)).sum(-1) for s in seen], 1) / H**0.5
            scores = torch.stack([matrix(block, x[b, t], x[b, s], 0) @ scores[:, i] for i, s in enumerate(seen)], 1)
            bias = torch.stack([-slopes * (t - s) for s in seen], 1)
            weights = (scores + bias).softmax(-1)
            weights = torch.stack([matrix(block, x[b, t], x[b, s], 1) @ weights[:, i] for i, s in enumerate(seen)], 1)
            for i, s in enumerate(seen):
                y[b, t] += weights[:, i, None] * v[b, s].repeat_interleave(2, 0)
    return y


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)], ids=str)
def test_every_pair_has_its_own_matrix_of_heads(attention: Any, dtype: torch.dtype, tolerance: float) -> None:
    attention, x = attention.to(dtype), torch.randn(2, T, D, dtype=dtype, requires_grad=True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], list(range(T))])
    y = attention(x, Pass(positions, segments=SEGMENTS))
    expected = attention.output(slow(attention, x, SEGMENTS).flatten(-2))
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    parameters, weigh = [x, *attention.parameters()], torch.randn_like(y)
    found, right = (torch.autograd.grad((t * weigh).sum(), parameters) for t in (y, expected))
    for one, other in zip(found, right, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance * 10, atol=tolerance * 10)


@pytest.mark.parametrize("window", [None, 3])
def test_a_cache_holds_what_keys_compose(make_block: Callable[..., Any], window: int | None) -> None:
    block = make_block("attention", {**NODE, "name": "sliding_window", "window": window})
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, positions = torch.randn(2, T, D, dtype=torch.float64), torch.arange(T)[None]
    whole = block(x, Pass(positions))
    cache: Cache = block.new_cache(2, T, torch.float64, x.device)
    assert sum(t[0, 0].numel() for t in cache.buffers.values()) == 2 * 2 * H + 2 * (2 * 3 + 1) * N
    mark = None
    for first, last in ((0, 3), (3, 4), (4, 6), (6, 7)):
        mark = cache.mark(2) if first == 4 else mark
        y = block(x[:, first:last], Pass(positions[:, first:last], cache=cache))
        torch.testing.assert_close(y, whole[:, first:last], rtol=0, atol=1e-9)
        if first == 4 and mark is not None:
            cache.rewind(mark, 1)
            y = block(x[:, 5:6], Pass(positions[:, 5:6], cache=cache))
            torch.testing.assert_close(y, whole[:, 5:6], rtol=0, atol=1e-9)


def test_without_written_directions_and_gates_it_is_a_plain_softmax(make_block: Callable[..., Any]) -> None:
    block = make_block("attention", NODE)
    plain = make_block("attention", {**NODE, "scores": None})
    plain.load_state_dict({n: t for n, t in block.state_dict().items() if not n.startswith("scores")})
    for parts in (block.scores.of_query, block.scores.of_key):
        nn.init.zeros_(parts.written)
        nn.init.zeros_(parts.gate.weight)
    x, given = torch.randn(2, T, D, dtype=torch.float64), Pass(torch.arange(T)[None])
    torch.testing.assert_close(block(x, given), plain(x, given), rtol=0, atol=1e-6)
