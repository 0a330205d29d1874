"""Products of a few rows: those of torch, wherever the other way is open."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pairwise import pairs
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from blockwright.blocks.kernels import c_library, few_rows
from blockwright.blocks.kernels.few_rows import (
    FEW,
    FEW_COMPILED,
    LANES,
    LEAST,
    PARTS,
    TOGETHER,
    compiled,
    few,
    linear,
    suits_compiled,
)
from blockwright.blocks.linear import Linear


@pytest.fixture(autouse=True)
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor."""
    monkeypatch.setattr(few_rows, "_pays", lambda: True)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize(
    ("shape", "n", "with_bias", "precision"),
    pairs(
        [(1, 1, 37), (37,), (2, 37), (1, 3, 37), (2, 2, 37), (FEW, 37), (FEW + 1, 37), (0, 37)],
        [PARTS, 5 * PARTS, 5 * PARTS + 1],
        [False, True],
        ["highest", "medium"],
    ),
)
@torch.no_grad()
def test_few_rows_are_torchs(n: int, shape: tuple[int, ...], with_bias: bool, precision: str) -> None:
    x, weight, bias = drawn(*shape), drawn(n, 37, seed=1), drawn(n, seed=2) if with_bias else None
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        got = linear(x, weight, bias)
        assert torch.get_float32_matmul_precision() == precision
        usual, is_own = F.linear(x, weight, bias), few(x, weight)
    finally:
        torch.set_float32_matmul_precision(before)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert got.shape == exact.shape and got.is_contiguous()
    if is_own or precision == "highest":
        torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)
    else:  # medium lets torch multiply in bf16, where the machine has units for it
        assert torch.equal(got, usual)


needs_compiler = pytest.mark.skipif(c_library.loaded("few_rows") is None, reason="no C compiler here")


@needs_compiler
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("n", "k"), [(TOGETHER, LANES), (7 * TOGETHER, 3 * LANES), (33 * TOGETHER, LEAST + LANES)])
@torch.no_grad()
def test_rows_in_c_are_torchs_and_those_of_each_alone(n: int, k: int, threads: int) -> None:
    weight, before = drawn(n, k, seed=1), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows in range(1, FEW_COMPILED + 2):
            x = drawn(k, rows).t()  # not side by side in memory
            got = compiled(x, weight)
            torch.testing.assert_close(got.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
            assert torch.equal(got, torch.cat([compiled(row, weight) for row in x.split(1)]))
    finally:
        torch.set_num_threads(before)


@needs_compiler
@torch.no_grad()
def test_matrices_of_real_models_are_read_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def noted(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(tuple(x.shape))
        return compiled(x, weight)

    monkeypatch.setattr(few_rows, "compiled", noted)
    weight, bias = drawn(3 * TOGETHER, LEAST, seed=1), drawn(3 * TOGETHER, seed=2)
    for shape in ((1, 1, LEAST), (2, 3, LEAST), (FEW_COMPILED, LEAST)):
        x = drawn(*shape)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    assert calls == [(1, 1, LEAST), (2, 3, LEAST), (FEW_COMPILED, LEAST)]


@needs_compiler
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (drawn(FEW_COMPILED + 1, LEAST), drawn(32, LEAST)),
        (drawn(1, LEAST - LANES), drawn(32, LEAST - LANES)),
        (drawn(1, LEAST + 1), drawn(32, LEAST + 1)),
        (drawn(1, LEAST), drawn(33, LEAST)),
        (drawn(1, LEAST), drawn(LEAST, 32).t()),
        (drawn(1, LEAST), drawn(32, LEAST, dtype=torch.float64)),
        (drawn(1, LEAST), drawn(32, LEAST).to("meta")),
        (drawn(1, 2 * LEAST), drawn(32, LEAST)),
        (nn.Parameter(drawn(1, LEAST)), drawn(32, LEAST)),
    ],
    ids=["many rows", "narrow", "odd columns", "odd rows", "transposed", "fp64", "meta", "other width", "parameter"],
)
@torch.no_grad()
def test_whatever_else_is_not_read_in_c(x: Tensor, weight: Tensor) -> None:
    assert suits_compiled(drawn(1, LEAST), drawn(32, LEAST)) and not suits_compiled(x, weight)


@needs_compiler
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_operators_that_are_counted_or_traced_are_torchs() -> None:
    with FlopCounterMode(display=False) as counter:
        linear(drawn(1, LEAST), drawn(32, LEAST))
    assert counter.get_total_flops() == 2 * 32 * LEAST
    weight, x = drawn(32, LEAST), drawn(2, LEAST, seed=3)
    traced = torch.jit.trace(lambda x: linear(x, weight), drawn(2, LEAST), check_trace=False)
    torch.testing.assert_close(traced(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_library_of_one_thread_leaves_several_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(few_rows_in_parallel=lambda: 0)
    monkeypatch.setattr(few_rows, "loaded", lambda name: library)
    few_rows._has_library.cache_clear()
    assert few_rows._has_library(1) and not few_rows._has_library(2)
    few_rows._has_library.cache_clear()


PROGRAM = """
import torch
from blockwright.blocks.kernels import few_rows
few_rows._pays = lambda: True
torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # as new programs do; the older function then raises
with torch.no_grad():
    few_rows.linear(torch.ones(1, 8), torch.ones(32, 8))
print(torch.backends.mkldnn.matmul.fp32_precision)
"""


@pytest.mark.slow
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
