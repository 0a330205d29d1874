"""The fused loss equals the plain one, whatever the chunk, and spends nothing on gradients nobody wants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blocks.kernels import cross_entropy
from blocks.kernels.cross_entropy import IGNORED, linear_cross_entropy, linear_cross_entropy_reference

T, D, V = 63, 10, 37


def inputs(dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(0, V, (T,)).masked_fill(torch.rand(T) < ignored, -100)
    hidden, weight = torch.randn(T, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


@pytest.fixture(params=[1, 4, 62, 63, 1000], ids="{} rows".format)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", request.param * V + 5)
    return request.param


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_loss_and_its_gradients_equal_the_plain_one_in_any_chunks(chunk: int, ignored: float) -> None:
    hidden, weight, targets = inputs(torch.float64, ignored)
    loss, plain = linear_cross_entropy(hidden, weight, targets), linear_cross_entropy_reference(hidden, weight, targets)
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
    torch.testing.assert_close(linear_cross_entropy_reference(hidden, weight, targets), by_hand, rtol=1e-12, atol=0)


def test_loss_passes_gradcheck(chunk: int) -> None:
    hidden, weight, targets = (x[:9] for x in inputs(torch.float64))
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    assert gradcheck(lambda h, w: linear_cross_entropy(h, w, targets.clamp(max=8)), (hidden, weight))


def test_half_precision_is_summed_in_single(chunk: int) -> None:
    hidden, weight, targets = inputs(torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, targets), rtol=1e-5, atol=0)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    plain = linear_cross_entropy_reference(*wide, targets)
    torch.testing.assert_close(loss.double(), plain, rtol=5e-3, atol=0)
    for got, right in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(plain, wide), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - right).norm() < 1e-2 * right.norm()


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_one_side_may_be_frozen(frozen: int) -> None:
    sides = list(inputs(torch.float64))
    targets = sides.pop()
    sides[frozen] = sides[frozen].detach()
    loss, plain = linear_cross_entropy(*sides, targets), linear_cross_entropy_reference(*sides, targets)
    learning = sides[1 - frozen]
    torch.testing.assert_close(
        torch.autograd.grad(loss, learning)[0], torch.autograd.grad(plain, learning)[0], rtol=0, atol=1e-12
    )


def test_gradient_reaches_what_made_the_hidden_states() -> None:
    hidden, weight, targets = inputs(torch.float64)
    first = torch.randn(D, D, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(linear_cross_entropy(hidden @ first, weight, targets), first)
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
    hidden, weight, targets = inputs(torch.float32)
    with off(), Products() as products:
        loss = linear_cross_entropy(hidden, torch.nn.Parameter(weight), targets)
    assert products.count == 3
    assert not loss.requires_grad
    torch.testing.assert_close(loss, linear_cross_entropy_reference(hidden, weight, targets).detach())


def test_loss_never_holds_all_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 4 * V)
    biggest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            if "mm" in str(func) and out.shape[-1] == V:
                biggest = max(biggest, out.numel())
            return out

    hidden, weight, targets = inputs(torch.float32)
    with Sizes():
        linear_cross_entropy(hidden, weight, targets)
    assert 0 < biggest <= 4 * V


def test_training_step_under_autocast_equals_the_plain_one() -> None:
    hidden, weight, targets = inputs(torch.float32)
    grads = []
    for f in (linear_cross_entropy, linear_cross_entropy_reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = f(hidden, weight, targets)
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for got, right in zip(*grads, strict=True):
        assert got.dtype == torch.float32
        assert (got - right).norm() < 2e-2 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_softcapped_loss_and_gradients_equal_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(63, 12, dtype=dtype), torch.randn(37, 12, dtype=dtype)
    targets = torch.randint(37, (63,)).masked_fill(torch.arange(63) % 7 == 0, IGNORED)
    ours, theirs = ([t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2))
    loss, expected = linear_cross_entropy(*ours, targets, 3.0), linear_cross_entropy_reference(*theirs, targets, 3.0)
    bound = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(loss, expected, rtol=bound, atol=0)
    assert abs(loss - linear_cross_entropy(hidden, weight, targets)) > 1
    for one, other in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, theirs), strict=True):
        assert (one - other).norm() <= bound * other.norm()
