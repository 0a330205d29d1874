"""Small models of this folder's tests, and what several of them do: packing, reading in parts, comparing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.forward_pass import Pass

Make = Callable[..., Any]  # the fixtures make_block, tiny and randomise
V, D = 61, 48
MODEL: dict[str, Any] = {
    "vocab_size": V,
    "d_model": D,
    "n_layers": 2,
    "max_positions": 64,
    "init": {"std": 0.2, "depth_scaled": False},
    "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "position": "rope",
    "ffn": {"name": "swiglu", "d_ff": 24},
    "norm": "rmsnorm",
    "residual": "prenorm",
}


def model(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy({**MODEL, **changes})


def decoder(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Decoder:
    return compose(model(**changes), seed=seed).to(dtype).eval()


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ids(length: int, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(seed))


def order(length: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + length)[None]


def nothing() -> Pass:
    """For blocks that read nothing of a pass but what others left for them."""
    return Pass(order(1), carry={})


def packed(*lengths: int, rows: int = 1) -> tuple[Tensor, Tensor]:
    """Positions and segments [B,T] of documents one after another."""
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.cat([torch.arange(n) for n in lengths]).expand(rows, -1), segments.expand(rows, -1)


def in_parts(model: Decoder, tokens: Tensor, chunks: Sequence[int], caches: Any = None) -> Tensor:
    """Hidden states of tokens that are read in chunks with caches."""
    caches = model.new_caches(*tokens.shape) if caches is None else caches
    return torch.cat([model.hidden(part, caches=caches)[0] for part in tokens.split(list(chunks), 1)], 1)


def rewind(caches: Iterable[Any], marks: Iterable[Any], *keep: Any) -> None:
    for cache, mark in zip(caches, marks, strict=True):
        cache.rewind(mark, *keep)


def near(found: Any, right: Any, atol: float = 1e-12, rtol: float = 0.0) -> None:
    torch.testing.assert_close(found, right, rtol=rtol, atol=atol)


def gradients(y: Tensor, inputs: Iterable[Tensor]) -> list[Tensor]:
    """Of a sum of y with random weights."""
    weights = drawn(*y.shape, seed=7).to(y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), list(inputs), allow_unused=True))
