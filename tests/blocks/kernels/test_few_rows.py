"""Products of a few rows: those of torch, wherever the other way is open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.kernels import few_rows
from blockwright.blocks.kernels.few_rows import FEW, PARTS, few, linear
from blockwright.blocks.linear import Linear


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor."""
    monkeypatch.setattr(few_rows, "_pays", lambda: True)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("precision", ["highest", "medium"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 37), (37,), (2, 37), (1, 3, 37), (2, 2, 37), (FEW, 37), (FEW + 1, 37), (0, 37)]
)
@pytest.mark.parametrize("n", [PARTS, 5 * PARTS, 5 * PARTS + 1])
@torch.no_grad()
def test_few_rows_are_torchs(n: int, shape: tuple[int, ...], with_bias: bool, precision: str) -> None:
    x, weight, bias = drawn(*shape), drawn(n, 37, seed=1), drawn(n, seed=2) if with_bias else None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = linear(x, weight, bias)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == exact.shape and got.is_contiguous()
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


PROGRAM = """
import torch
from blockwright.blocks.kernels import few_rows
few_rows._pays = lambda: True
torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # as new programs do; the older function then raises
with torch.no_grad():
    few_rows.linear(torch.ones(1, 8), torch.ones(32, 8))
print(torch.backends.mkldnn.matmul.fp32_precision)
"""


def test_either_way_to_set_the_precision_is_minded(environment: dict[str, str]) -> None:
    env = {**environment, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.stdout == "bf16\n", done.stderr


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (drawn(FEW + 1, 8), drawn(32, 8)),
        (drawn(1, 8, dtype=torch.bfloat16), drawn(32, 8, dtype=torch.bfloat16)),
        (drawn(1, 8, dtype=torch.float64), drawn(32, 8, dtype=torch.float64)),
        (drawn(1, 8), drawn(33, 8)),
        (drawn(1, 8), drawn(8, 32).t()),
        (drawn(1, 8).to("meta"), drawn(32, 8).to("meta")),
    ],
    ids=["many rows", "bf16", "fp64", "no even parts", "transposed", "meta"],
)
@torch.no_grad()
def test_whatever_else_goes_the_usual_way(x: Tensor, weight: Tensor) -> None:
    assert few(drawn(1, 8), drawn(32, 8)) and not few(x, weight)
    assert linear(x, weight).shape == (len(x), len(weight))


def test_gradients_compilers_and_autocast_go_the_usual_way() -> None:
    x, weight = drawn(1, 8), drawn(32, 8)
    assert not few(x, weight)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert not few(x, weight) and linear(x, weight).dtype == torch.bfloat16
        compiled = torch.compile(linear, fullgraph=True, backend="eager")  # a way with a setting in it has no graph
        torch.testing.assert_close(compiled(x, weight), F.linear(x, weight))


def test_linear_is_torchs_with_its_names_and_its_gradients() -> None:
    ours, theirs = Linear(8, 32), nn.Linear(8, 32)
    theirs.load_state_dict(ours.state_dict())
    x = drawn(3, 8).requires_grad_()
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(ours(x).sum(), x)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs(x).sum(), x)[0], rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x[:1]), theirs(x[:1]))
