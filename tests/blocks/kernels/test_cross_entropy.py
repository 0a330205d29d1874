"""The fused loss equals the plain one, whatever the chunk, and spends nothing on gradients that are not needed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright.blocks.kernels import cross_entropy
from blockwright.blocks.kernels.cross_entropy import (
    IGNORED,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from blockwright.blocks.kernels.liger import liger_cross_entropy

T, D, V = 63, 10, 37


def loss_of(*arguments: Any, **options: Any) -> Tensor:
    return linear_cross_entropy(*arguments, **options)[0]


def reference(*arguments: Any, **options: Any) -> Tensor:
    return linear_cross_entropy_reference(*arguments, **options)[0]


def inputs(dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < ignored, -100)
    hidden, weight = torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.fixture(params=[(4, V), (63, V), (1000, V), (1, 13), (7, 10), (63, 36)], ids=str)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Tokens and vocabulary of a chunk."""
    rows, columns = request.param
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * columns)
    monkeypatch.setattr(cross_entropy, "ROWS", 1 if columns == V else 1000)
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", rows)
    assert cross_entropy.chunk_shape(T, V, torch.empty(0)) == (min(rows, T), columns)
    return rows, columns


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_loss_and_its_gradients_equal_the_plain_one_in_any_chunks(chunk: tuple[int, int], ignored: float) -> None:
    hidden, weight, targets = inputs(torch.float64, ignored)
    loss, plain = loss_of(hidden, weight, targets), reference(hidden, weight, targets)
    torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
    for got, right in zip(
        torch.autograd.grad(3.0 * loss, (hidden, weight)),
        torch.autograd.grad(3.0 * plain, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-12)


def test_reference_is_minus_the_log_of_the_targets_probability() -> None:
    hidden, weight, targets = inputs(torch.float64)
    probs = (hidden @ weight.t()).softmax(-1)
    by_hand = -sum(probs[t, y].log() for t, y in enumerate(targets.tolist()) if y != -100)
    torch.testing.assert_close(reference(hidden, weight, targets), by_hand, rtol=1e-12, atol=0)


def test_loss_passes_gradcheck() -> None:
    hidden, weight, targets = (x[:9] for x in inputs(torch.float64))
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    assert gradcheck(lambda h, w: loss_of(h, w, targets.clamp(max=8), z_loss=0.1), (hidden, weight))


def test_half_precision_is_summed_in_single(chunk: tuple[int, int]) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    loss = loss_of(hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, reference(hidden, weight, targets), rtol=1e-5, atol=0)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    plain = reference(*wide, targets)
    torch.testing.assert_close(loss.double(), plain, rtol=5e-3, atol=0)
    for got, right in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, wide), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - right).norm() < 1e-2 * right.norm()


@pytest.mark.slow
def test_half_precision_is_summed_over_chunks_in_single(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 addends of one size bf16 would lose the second half."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    many, one = torch.ones(512, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss_of(many, weight, torch.zeros(512, dtype=torch.int64)).backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [-256.0, 256.0]
    hidden = one.requires_grad_()
    loss_of(hidden, many, torch.zeros(1, dtype=torch.int64)).backward()
    assert hidden.grad is not None and abs(float(hidden.grad)) < 0.01


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_one_side_may_be_frozen(frozen: int) -> None:
    sides = list(inputs(torch.float64))
    targets = sides.pop()
    sides[frozen] = sides[frozen].detach()
    loss, plain = loss_of(*sides, targets), reference(*sides, targets)
    learning = sides[1 - frozen]
    torch.testing.assert_close(
        torch.autograd.grad(loss, learning)[0], torch.autograd.grad(plain, learning)[0], rtol=0, atol=1e-12
    )


def test_gradient_reaches_what_made_the_hidden_states() -> None:
    hidden, weight, targets = inputs(torch.float64)
    first = torch.randn(D, D, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(loss_of(hidden @ first, weight, targets), first)
    logits = F.linear(hidden @ first, weight)
    (right,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), first)
    torch.testing.assert_close(got, right, rtol=0, atol=1e-11)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_without_gradients_only_the_logits_are_multiplied_out(off: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 21 * V)
    monkeypatch.setattr(cross_entropy, "ROWS", 21)
    hidden, weight, targets = inputs(torch.float32)
    with off(), Products() as products:
        loss = loss_of(hidden, torch.nn.Parameter(weight), targets)
    assert products.count == 3
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, targets).detach())


@pytest.mark.parametrize("vocabulary", [300, 5_000])
def test_loss_never_holds_more_logits_than_its_bound(vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1200)
    monkeypatch.setattr(cross_entropy, "ROWS", 4)
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", 10)
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor))
            return out

    hidden, weight = torch.randn(63, 2, requires_grad=True), torch.randn(vocabulary, 2, requires_grad=True)
    with Sizes():
        loss_of(hidden, weight, torch.zeros(63, dtype=torch.int64), 5.0, z_loss=0.1)
    assert max(n for n in sizes if n != weight.numel()) <= 1200


def test_long_vocabulary_is_cut_and_a_short_one_is_not() -> None:
    single, half = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)
    assert cross_entropy.chunk_shape(4096, 8192, half) == (512, 8192)
    assert cross_entropy.chunk_shape(100, 257, single) == (100, 257)
    assert cross_entropy.chunk_shape(4096, 32_000, single) == (131, 32_000)
    assert cross_entropy.chunk_shape(4096, 32_000, half) == (512, 8192)
    assert cross_entropy.chunk_shape(4096, 129_280, single) == (512, 8192)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_z_loss_and_weights_of_tokens_equal_the_reference(chunk: tuple[int, int], softcap: float | None) -> None:
    hidden, weight, targets = inputs(torch.float64)
    options: dict[str, Any] = {"z_loss": 0.3, "weights": torch.rand(T).masked_fill(torch.arange(T) % 5 == 0, 0.0)}
    loss = loss_of(hidden, weight, targets, softcap, **options)
    plain = reference(hidden, weight, targets, softcap, **options)
    torch.testing.assert_close(loss, plain, rtol=1e-12, atol=0)
    for got, right in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-11)


def test_z_loss_is_told_by_itself_and_is_the_square_of_log_z() -> None:
    hidden, weight, targets = inputs(torch.float64)
    loss, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.01)
    log_z = (hidden @ weight.t()).exp().sum(-1).log()
    torch.testing.assert_close(z, log_z[targets != IGNORED].square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss - 0.01 * z, loss_of(hidden, weight, targets), rtol=1e-12, atol=0)
    assert loss.requires_grad and not z.requires_grad


def test_logits_far_apart_neither_overflow_nor_vanish(chunk: tuple[int, int]) -> None:
    hidden, weight, targets = inputs(torch.float32)
    far = (200 * hidden).detach().requires_grad_()
    loss = loss_of(far, weight, targets)
    plain = reference(far, weight, targets)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    for got, right in zip(
        torch.autograd.grad(loss, (far, weight)), torch.autograd.grad(plain, (far, weight)), strict=True
    ):
        assert torch.isfinite(got).all()
        assert (got - right).norm() <= 1e-5 * right.norm()


def test_training_step_under_autocast_equals_the_plain_one() -> None:
    hidden, weight, targets = inputs(torch.float32)
    grads = []
    for f in (loss_of, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = f(hidden, weight, targets)
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for got, right in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - right).norm() < 2e-2 * right.norm()
        assert torch.equal(got, got.bfloat16().float())  # of products in bf16


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softcapped_loss_and_gradients_equal_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(63, 12, dtype=dtype), torch.randn(37, 12, dtype=dtype)
    targets = torch.randint(37, (63,)).masked_fill(torch.arange(63) % 7 == 0, IGNORED)
    ours, theirs = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    loss, expected = loss_of(*ours, targets, 3.0), reference(*theirs, targets, 3.0)
    bound = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(loss, expected, rtol=bound, atol=0)
    assert abs(loss - loss_of(hidden, weight, targets)) > 1
    for one, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        assert (one - other).norm() <= bound * other.norm()


def test_ligers_kernel_is_given_the_same_and_tells_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, with its arithmetic done by the reference: the kernels need a GPU."""
    hidden, weight, targets = inputs(torch.float64)

    def fused(*given: Tensor, ignore_index, lse_square_scale, reduction, softcap, return_z_loss, accum_dtype):
        assert (ignore_index, reduction, return_z_loss) == (IGNORED, "sum", True)
        whole = reference(*given, softcap, z_loss=lse_square_scale)
        return SimpleNamespace(loss=whole, z_loss=whole - reference(*given, softcap))

    module = SimpleNamespace(liger_fused_linear_cross_entropy=fused)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", module)
    for z_loss in (0.0, 0.2):
        got = liger_cross_entropy(hidden, weight, targets, 3.0, z_loss)
        right = linear_cross_entropy(hidden, weight, targets, 3.0, z_loss)
        torch.testing.assert_close(got[0], right[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(got[1], right[1] * (z_loss > 0), rtol=1e-12, atol=0)


def test_backward_pass_makes_no_second_gradient_of_the_head() -> None:
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    targets = torch.arange(6)
    loss = linear_cross_entropy(hidden, weight, targets)[0] / 6
    (saved,) = [t for t in loss.grad_fn.next_functions[0][0].saved_tensors if t.shape == weight.shape]  # type: ignore[union-attr]
    loss.backward(retain_graph=True)
    first = weight.grad.clone()  # type: ignore[union-attr]
    weight.grad = None
    loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, first)
    assert torch.equal(saved, first)  # it has been scaled where it was
