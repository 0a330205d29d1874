"""How results and gradients of a kernel are compared with its reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.kernels import seam
from blockwright.blocks.kernels.coded_attention import Codes, coded_attention_reference, group_sizes, quantise
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.blocks.kernels.seam import chain, implementations

PRECISIONS = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2}
TIGHT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [drawn(*shape, dtype=dtype, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def wide(value: Any) -> Any:
    """In double precision, as a new leaf where it is one that learns."""
    if isinstance(value, dict):
        return {name: wide(inner) for name, inner in value.items()}
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def with_gradients(
    call: Callable[..., Tensor], given: Sequence[Tensor], rounded: torch.dtype | None = None
) -> list[Tensor]:
    """A result and the gradients of a weighted sum of it, with weights that are rounded to a dtype."""
    y = call(*given)
    learnt = [t for t in given if t.requires_grad]
    weights = drawn(*y.shape, dtype=rounded or y.dtype, seed=9).to(y.dtype)
    return [y, *torch.autograd.grad(y, learnt, weights)] if learnt else [y]


def assert_same(
    call: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    given: Sequence[Tensor],
    tolerance: float,
    rtol: float = 0.0,
    slack: float = 4.0,
) -> None:
    """Results and gradients of a call are those of the reference in double precision, in the dtypes of what is given.

    Gradients may differ by ``slack`` times as much: they are sums of more products.
    """
    found = with_gradients(call, given)
    right = with_gradients(reference, [wide(t) for t in given], found[0].dtype)
    dtypes = [given[0].dtype, *(t.dtype for t in given if t.requires_grad)]
    for i, (got, wanted, dtype) in enumerate(zip(found, right, dtypes, strict=True)):
        assert got.dtype == dtype
        bounds = {"rtol": tolerance, "atol": slack * tolerance} if i else {"rtol": rtol, "atol": tolerance}
        torch.testing.assert_close(got.double(), wanted.double(), **bounds)


def assert_compiles(call: Callable[..., Tensor], given: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    """A call is one graph, and what that computes is the same."""
    torch._dynamo.reset()
    compiled = with_gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), given)
    for got, expected in zip(compiled, with_gradients(call, given), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def single(*shape: int) -> Tensor:
    return drawn(*shape, dtype=torch.float32, seed=sum(shape))


def stored(B: int, S: int, K: int, H: int, bits: int, seed: int = 0) -> Codes:
    """Of S tokens in a cache with room for more."""
    sizes, x = group_sizes([H] * K), drawn(B, S + 7, K * H, dtype=torch.float32, seed=seed)
    return Codes(*quantise(x, bits, sizes), bits, tuple(sizes), K, H).some(slice(0, S))


def pair(B: int, S: int, K: int, H: int, bits: int) -> tuple[Codes, Codes]:
    return stored(B, S, K, H, bits), stored(B, S, K, H, bits, seed=1)


def off(found: Tensor, q: Tensor, keys: Codes, values: Codes, scoring: Scoring) -> float:
    right = coded_attention_reference(q.double(), keys, values, scoring)
    return float((found.double() - right).norm() / right.norm())


def spy(monkeypatch: pytest.MonkeyPatch, *kernels: str) -> list[tuple[str, tuple[Any, ...]]]:
    """The implementation and the arguments of every further call of some kernels, by what is built from now on."""
    calls: list[tuple[str, tuple[Any, ...]]] = []
    for kernel in kernels:
        for name, one in implementations(kernel).items():

            def noting(*given: Any, name: str = name, call: Callable[..., Any] = one.call) -> Any:
                calls.append((name, given))
                return call(*given)

            monkeypatch.setitem(seam._known[kernel], name, replace(one, call=noting))
    chain.cache_clear()
    return calls


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
