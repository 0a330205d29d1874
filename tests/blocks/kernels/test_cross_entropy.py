"""The fused loss and log-probabilities equal the plain ones in any chunks, and spend nothing that is not needed."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from blockwright.blocks.kernels import cross_entropy
from blockwright.blocks.kernels.by_name import liger_cross_entropy
from blockwright.blocks.kernels.cross_entropy import IGNORED, linear_cross_entropy, linear_cross_entropy_reference
from blockwright.blocks.kernels.log_probabilities import linear_log_probabilities, linear_log_probabilities_reference
from tests.blocks.kernels.compared import assert_same, drawn, leaves, wide

T, D, V = 63, 10, 37
CHUNKS = [(4, V), (63, V), (1000, V), (1, 13), (7, 10), (63, 36)]  # tokens and vocabulary of one


def loss_of(*arguments: Any, **options: Any) -> Tensor:
    return linear_cross_entropy(*arguments, **options)[0]


def reference(*arguments: Any, **options: Any) -> Tensor:
    return linear_cross_entropy_reference(*arguments, **options)[0]


def targets_of(ignored: float = 0.3) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    targets = torch.randint(0, V, (T,), generator=draw)
    return targets.masked_fill(torch.rand(T, generator=draw) < ignored, IGNORED)


def inputs(dtype: torch.dtype, ignored: float = 0.3) -> tuple[Tensor, Tensor, Tensor]:
    return *leaves((T, D), (V, D), dtype=dtype), targets_of(ignored)  # type: ignore[return-value]


def cut(monkeypatch: pytest.MonkeyPatch, chunk: tuple[int, int]) -> None:
    rows, columns = chunk
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", rows * columns)
    monkeypatch.setattr(cross_entropy, "ROWS", 1 if columns == V else 1000)
    monkeypatch.setattr(cross_entropy, "BLOCK_ROWS", rows)
    assert cross_entropy.chunk_shape(T, V, torch.empty(0)) == (min(rows, T), columns)


@pytest.mark.parametrize("chunk", CHUNKS, ids=str)
def test_loss_and_its_gradients_equal_the_plain_one_in_any_chunks(
    chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch, chunk)
    weights = drawn(T).abs().float().masked_fill(torch.arange(T) % 5 == 0, 0.0)
    for ignored, softcap, options in (
        *((ignored, None, {}) for ignored in (0.0, 0.3, 1.0)),
        *((0.3, softcap, {"z_loss": 0.3, "weights": weights}) for softcap in (None, 3.0)),
    ):
        hidden, weight, targets = inputs(torch.float64, ignored)
        found, plain = (f(hidden, weight, targets, softcap, **options) for f in (loss_of, reference))
        torch.testing.assert_close(found, plain, rtol=1e-12 if options else 1e-13, atol=0)
        grads = [torch.autograd.grad(3.0 * one, (hidden, weight)) for one in (found, plain)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-11 if options else 1e-12)
    for dtype, size, bound in ((torch.bfloat16, 1, 1e-2), (torch.float32, 200, 1e-5)):  # logits far apart in the second
        hidden, weight, targets = inputs(dtype)
        given = [(size * hidden).detach().requires_grad_(), weight]
        loss, plain = loss_of(*given, targets), reference(*given, targets)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
        others = [wide(t) for t in given] if dtype == torch.bfloat16 else given
        exact = reference(*others, targets)
        torch.testing.assert_close(loss.double(), exact.double(), rtol=5e-3, atol=0)
        for got, right in zip(torch.autograd.grad(loss, given), torch.autograd.grad(exact, others), strict=True):
            assert got.dtype == dtype and (got.double() - right).norm() < bound * right.norm()


def test_reference_and_its_z_loss_are_their_formulas() -> None:
    hidden, weight, targets = inputs(torch.float64)
    logits = hidden @ weight.t()
    probs, log_z = logits.softmax(-1), logits.exp().sum(-1).log()
    by_hand = -sum(probs[t, y].log() for t, y in enumerate(targets.tolist()) if y != IGNORED)
    torch.testing.assert_close(reference(hidden, weight, targets), by_hand, rtol=1e-12, atol=0)
    loss, z = linear_cross_entropy(hidden, weight, targets, z_loss=0.01)
    torch.testing.assert_close(z, log_z[targets != IGNORED].square().sum(), rtol=1e-12, atol=0)
    torch.testing.assert_close(loss - 0.01 * z, loss_of(hidden, weight, targets), rtol=1e-12, atol=0)
    assert loss.requires_grad and not z.requires_grad
    first = drawn(D, D, seed=3).requires_grad_()  # the gradient reaches what made the hidden states
    (got,) = torch.autograd.grad(loss_of(hidden @ first, weight, targets), first)
    plain = F.cross_entropy(F.linear(hidden @ first, weight), targets, reduction="sum")
    torch.testing.assert_close(got, torch.autograd.grad(plain, first)[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("odd", [-1, V, IGNORED - 1])
def test_a_loss_with_a_target_that_is_no_id_is_no_number(odd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss would else be log Z, a figure like any other."""
    cut(monkeypatch, (7, 10))
    hidden, weight, targets = inputs(torch.float32)
    assert loss_of(hidden, weight, targets).isfinite()
    changed = targets.index_fill(0, torch.tensor(5), odd)
    assert loss_of(hidden, weight, changed).isnan()
    assert linear_log_probabilities(hidden, weight, changed).isnan().nonzero().tolist() == [[5]]


def test_loss_and_log_probabilities_pass_gradcheck() -> None:
    hidden, weight, targets = (x[:9].detach() for x in inputs(torch.float64))
    given, aims = (hidden.requires_grad_(), weight.requires_grad_()), targets.clamp(max=8)
    assert gradcheck(lambda h, w: loss_of(h, w, aims, z_loss=0.1), given)
    few = [x[:5].detach().requires_grad_() for x in (hidden, weight)]
    among = torch.stack((torch.arange(5).repeat_interleave(2), torch.tensor([0, 1, 1, 3, 2, 4, 3, 0, 4, 2])))
    for kept in (None, among):
        assert gradcheck(lambda h, w, k=kept: linear_log_probabilities(h, w, torch.arange(5), 2.0, 0.7, k), few)


@pytest.mark.parametrize("logp", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_half_precision_is_summed_over_chunks_in_single(logp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 512 addends of one size bf16 would lose the second half."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", 1)
    many, weight = torch.ones(512, 1).bfloat16(), torch.zeros(2, 1).bfloat16().requires_grad_()
    call = (lambda *given: -linear_log_probabilities(*given).sum()) if logp else loss_of
    call(many, weight, torch.zeros(512, dtype=torch.int64)).backward()
    assert weight.grad is not None and weight.grad.flatten().tolist() == [-256.0, 256.0]
    hidden = torch.ones(1, 1).bfloat16().requires_grad_()
    call(hidden, many, torch.zeros(1, dtype=torch.int64)).backward()
    assert hidden.grad is not None and abs(float(hidden.grad)) < 0.01


@pytest.mark.parametrize("frozen", [0, 1], ids=["hidden", "weight"])
def test_one_side_may_be_frozen(frozen: int) -> None:
    *sides, targets = inputs(torch.float64, 0.0)
    sides[frozen] = sides[frozen].detach()
    both = [(loss_of, reference), (linear_log_probabilities, linear_log_probabilities_reference)]
    for call, plain in both:
        assert_same(
            lambda *s, f=call: f(*s, targets), lambda *s, f=plain: f(*s, targets), sides, 1e-12, rtol=1e-12, slack=1
        )


class Seen(TorchDispatchMode):
    """Counts matrix products, and notes the sizes of all that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.products, self.sizes = 0, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.matmul)
        out = func(*args, **(kwargs or {}))
        self.sizes += [t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)]
        return out


def test_without_gradients_only_the_logits_are_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch, (21, V))
    hidden, weight, targets = inputs(torch.float32)
    for off in (torch.no_grad, torch.inference_mode):
        with off(), Seen() as seen:
            loss = loss_of(hidden, torch.nn.Parameter(weight), targets)
        assert seen.products == 3 and not loss.requires_grad
        torch.testing.assert_close(loss, reference(hidden, weight, targets).detach())


def test_loss_never_holds_more_logits_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHUNK_ELEMENTS", 1200), ("ROWS", 4), ("BLOCK_ROWS", 10)):
        monkeypatch.setattr(cross_entropy, name, value)
    for vocabulary in (300, 2_500):
        hidden, weight = leaves((33, 2), (vocabulary, 2), dtype=torch.float32)
        with Seen() as seen:
            loss_of(hidden, weight, torch.zeros(33, dtype=torch.int64), 5.0, z_loss=0.1)
        assert max(n for n in seen.sizes if n != weight.numel()) <= 1200


def test_long_vocabulary_is_cut_and_a_short_one_is_not() -> None:
    single, half = torch.empty(0), torch.empty(0, dtype=torch.bfloat16)
    shapes = {(4096, 8192, half): (512, 8192), (100, 257, single): (100, 257), (4096, 32_000, single): (131, 32_000)}
    shapes |= {(4096, 32_000, half): (512, 8192), (4096, 129_280, single): (512, 8192)}
    assert {given: cross_entropy.chunk_shape(*given) for given in shapes} == shapes


def test_training_step_under_autocast_equals_the_plain_one() -> None:
    hidden, weight, targets = inputs(torch.float32)
    grads = []
    for f in (loss_of, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = f(hidden, weight, targets)
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for got, right in zip(*grads, strict=True):
        assert got.dtype == torch.float32 and (got - right).norm() < 2e-2 * right.norm()
        assert torch.equal(got, got.bfloat16().float())  # of products in bf16
    with torch.autocast("cpu", torch.bfloat16):
        logp = linear_log_probabilities(hidden, weight, targets_of(0.0))
    half = linear_log_probabilities(hidden.bfloat16(), weight.bfloat16(), targets_of(0.0))
    assert torch.equal(logp, half) and not torch.equal(logp, linear_log_probabilities(hidden, weight, targets_of(0.0)))
    logp.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def test_ligers_kernel_is_given_the_same_and_tells_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, with its arithmetic done by the reference: the kernels need a GPU."""
    hidden, weight, targets = inputs(torch.float64)

    def fused(*given: Tensor, ignore_index, lse_square_scale, reduction, softcap, return_z_loss, accum_dtype):
        assert (ignore_index, reduction, return_z_loss) == (IGNORED, "sum", True)
        whole = reference(*given, softcap, z_loss=lse_square_scale)
        return SimpleNamespace(loss=whole, z_loss=whole - reference(*given, softcap))

    functional = SimpleNamespace(liger_fused_linear_cross_entropy=fused)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    for z_loss in (0.0, 0.2):
        got = liger_cross_entropy(hidden, weight, targets, 3.0, z_loss)
        right = linear_cross_entropy(hidden, weight, targets, 3.0, z_loss)
        torch.testing.assert_close(got[0], right[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(got[1], right[1] * (z_loss > 0), rtol=1e-12, atol=0)


def test_backward_pass_makes_no_second_gradient_of_the_head() -> None:
    hidden, weight = leaves((6, 8), (500, 8), dtype=torch.float32)
    loss = linear_cross_entropy(hidden, weight, torch.arange(6))[0] / 6
    (saved,) = [t for t in loss.grad_fn.next_functions[0][0].saved_tensors if t.shape == weight.shape]  # type: ignore[union-attr]
    loss.backward(retain_graph=True)
    first, weight.grad = weight.grad.clone(), None  # type: ignore[union-attr]
    loss.backward()
    assert weight.grad is not None and torch.equal(weight.grad, first)
    assert torch.equal(saved, first)  # it has been scaled where it was


# --- log-probabilities ------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 0.7}, {"softcap": 2.0, "temperature": 1.3}]


@pytest.mark.parametrize("chunk", [CHUNKS[0], *CHUNKS[2:]], ids=str)
def test_log_probabilities_and_their_gradients_equal_the_plain_ones(
    chunk: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also among kept tokens: each row's target and some others, for some rows none."""
    cut(monkeypatch, chunk)
    targets, draw = targets_of(0.0), torch.Generator().manual_seed(1)
    kept = torch.rand(T, V, generator=draw) < torch.rand(T, 1, generator=draw) - 0.2
    kept[range(T), targets] = True
    ours, plain = linear_log_probabilities, linear_log_probabilities_reference
    precisions = [(torch.float64, 1e-12), (torch.float32, 2e-5)]
    for options, (dtype, near), among in each(OPTIONS, precisions, [None, kept.nonzero().T, kept.nonzero().T]):
        given = targets, options.get("softcap"), options.get("temperature", 1.0), among
        sides = leaves((T, D), (V, D), dtype=dtype)
        assert_same(lambda *s, g=given: ours(*s, *g), lambda *s, g=given: plain(*s, *g), sides, near, slack=1)
    sides = leaves((T, D), (V, D), dtype=torch.bfloat16)
    doubled, arriving = [wide(x) for x in sides], drawn(T)
    logp = linear_log_probabilities(*sides, targets, None, 0.7, kept.nonzero().T)
    right = linear_log_probabilities_reference(*doubled, targets, None, 0.7, kept.nonzero().T)
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), right, rtol=5e-3, atol=5e-2)  # of the products, in bf16
    grads = torch.autograd.grad(logp, sides, arriving.float()), torch.autograd.grad(right, doubled, arriving)
    for got, wanted in zip(*grads, strict=True):
        assert got.dtype == torch.bfloat16 and (got.double() - wanted).norm() < 2e-2 * wanted.norm()
