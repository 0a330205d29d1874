"""Log-probabilities by chunks, and their gradients, equal the plain ones, whatever the chunk and the kept tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.autograd import gradcheck

from blockwright.blocks.kernels import cross_entropy
from blockwright.blocks.kernels.log_probabilities import linear_log_probabilities, linear_log_probabilities_reference

T, D, V = 63, 10, 37
OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"softcap": 2.0, "temperature": 1.3}]


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, targets, and kept tokens: each row's target and some others, for some rows none."""
    torch.manual_seed(0)
    targets = torch.randint(0, V, (T,))
    kept = torch.rand(T, V) < torch.rand(T, 1) - 0.2
    kept[range(T), targets] = True
    hidden, weight = torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, kept.nonzero().T


@pytest.fixture(params=[(4, V), (1000, V), (1, 13), (7, 10), (63, 36)], ids=str)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and vocabulary of a chunk."""
    rows, columns = request.param
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * columns)
    monkeypatch.setattr(cross_entropy, "ROWS", 1 if columns == V else 1000)
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", rows)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize(
    ("options", "dtype", "near", "narrowed"),
    each(OPTIONS, [torch.float64, torch.float32], [1e-12, 2e-5], [False, True, True]),
    ids=str,
)
def test_they_and_their_gradients_equal_the_plain_ones(
    dtype: torch.dtype, near: float, options: dict[str, Any], narrowed: bool
) -> None:
    hidden, weight, targets, kept = inputs(dtype)
    given = (
        hidden,
        weight,
        targets,
        options.get("softcap"),
        options.get("temperature", 1.0),
        kept if narrowed else None,
    )
    logp, plain = linear_log_probabilities(*given), linear_log_probabilities_reference(*given)
    assert logp.dtype == dtype
    torch.testing.assert_close(logp, plain, rtol=0, atol=near)
    arriving = torch.randn(T, dtype=dtype)
    for got, right in zip(
        torch.autograd.grad(logp, (hidden, weight), arriving),
        torch.autograd.grad(plain, (hidden, weight), arriving),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=near)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("narrowed", [True])
def test_half_precision_is_summed_in_single(narrowed: bool) -> None:
    hidden, weight, targets, kept = inputs(torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    among = kept if narrowed else None
    logp = linear_log_probabilities(hidden, weight, targets, None, 0.7, among)
    plain = linear_log_probabilities_reference(*wide, targets, None, 0.7, among)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), plain, rtol=5e-3, atol=5e-2)  # of the products, in bf16
    arriving = torch.randn(T)
    for got, right in zip(
        torch.autograd.grad(logp, (hidden, weight), arriving),
        torch.autograd.grad(plain, wide, arriving.double()),
        strict=True,
    ):
        assert got.dtype == torch.bfloat16
        assert (got.double() - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize("narrowed", [False, True])
def test_they_pass_gradcheck(narrowed: bool) -> None:
    hidden, weight, targets, kept = inputs(torch.float64)
    few = [x[:5].detach().requires_grad_() for x in (hidden, weight[targets[:5]])]
    among = torch.stack((torch.arange(5).repeat_interleave(2), torch.tensor([0, 1, 1, 3, 2, 4, 3, 0, 4, 2])))
    aims, kept = torch.arange(5), among if narrowed else None
    assert gradcheck(lambda h, w: linear_log_probabilities(h, w, aims, 2.0, 0.7, kept), few)


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_one_side_may_be_frozen(frozen: int) -> None:
    sides = list(inputs(torch.float64)[:2])
    targets = inputs(torch.float64)[2]
    sides[frozen] = sides[frozen].detach()
    got, right = (
        torch.autograd.grad(f(*sides, targets).square().sum(), sides[1 - frozen])[0]
        for f in (linear_log_probabilities, linear_log_probabilities_reference)
    )
    torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


def test_autocast_multiplies_in_half_precision() -> None:
    hidden, weight, targets, _ = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_log_probabilities(hidden, weight, targets)
    half = linear_log_probabilities(hidden.bfloat16(), weight.bfloat16(), targets)
    assert torch.equal(logp, half) and not torch.equal(logp, linear_log_probabilities(hidden, weight, targets))
    logp.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_half_precision_is_summed_over_chunks_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 addends of one size bf16 would lose half."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    many, weight = torch.ones(400, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    linear_log_probabilities(many, weight, torch.zeros(400, dtype=torch.int64)).sum().backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [200.0, -200.0]
