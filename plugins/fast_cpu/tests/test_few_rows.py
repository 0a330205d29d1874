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

from blockwright.blocks.kernels import products
from blockwright.blocks.kernels.products import linear
from blockwright.blocks.linear import Linear
from blockwright.plugins.fast_cpu import c_library
from blockwright.plugins.fast_cpu.c_library import WIDE
from blockwright.plugins.fast_cpu.few_rows import FEW, FEW_COMPILED, LEAST, PARTS, TOGETHER, compiled, few, suits
from tests.blocks.kernels.compared import drawn, spy, threads

CHOSEN = products.Choice(few_rows={FEW_COMPILED: ("few_rows", "mkl")})
needs_compiler = pytest.mark.skipif(c_library.loaded("few_rows") is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def chosen() -> None:
    """On any processor."""
    products.use(CHOSEN)


def single(*shape: int, seed: int = 0) -> Tensor:
    return drawn(*shape, dtype=torch.float32, seed=seed)


@torch.no_grad()
def test_few_rows_are_torchs() -> None:
    shapes = [(1, 1, 37), (37,), (2, 37), (1, 3, 37), (2, 2, 37), (FEW, 37), (FEW + 1, 37), (0, 37)]
    sizes, precisions = [PARTS, 5 * PARTS, 5 * PARTS + 1], ["highest", "medium"]
    for shape, n, with_bias, precision in pairs(shapes, sizes, [False, True], precisions):
        x, weight, bias = single(*shape), single(n, 37, seed=1), single(n, seed=2) if with_bias else None
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


@needs_compiler
@torch.no_grad()
def test_rows_in_c_are_torchs_and_those_of_each_alone(vectors: None) -> None:
    for n, k in ((TOGETHER, WIDE), (7 * TOGETHER, 3 * WIDE), (33 * TOGETHER, LEAST + WIDE)):
        weight = single(n, k, seed=1)
        for rows in range(1, FEW_COMPILED + 2):
            x = single(k, rows).t()  # not side by side in memory
            with threads(1 + 2 * (rows % 2)):
                got = compiled(x, weight)
            torch.testing.assert_close(got.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-5)
            assert torch.equal(got, torch.cat([compiled(row, weight) for row in x.split(1)]))


@needs_compiler
@torch.no_grad()
def test_matrices_of_real_models_are_read_in_c(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spy(monkeypatch, "linear")
    products.use(CHOSEN)
    weight, bias = single(3 * TOGETHER, LEAST, seed=1), single(3 * TOGETHER, seed=2)
    shapes = [(1, 1, LEAST), (2, 3, LEAST), (FEW_COMPILED, LEAST)]
    for shape in shapes:
        x = single(*shape)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
    assert [(name, given[0].shape) for name, given in calls] == [("few_rows", shape) for shape in shapes]


@torch.no_grad()
def test_whatever_else_is_not_read_in_c_or_goes_the_usual_way() -> None:
    in_c = {
        "many rows": (single(FEW_COMPILED + 1, LEAST), single(32, LEAST)),
        "narrow": (single(1, LEAST - WIDE), single(32, LEAST - WIDE)),
        "odd columns": (single(1, LEAST + 1), single(32, LEAST + 1)),
        "odd rows": (single(1, LEAST), single(33, LEAST)),
        "transposed": (single(1, LEAST), single(LEAST, 32).t()),
        "fp64": (single(1, LEAST), drawn(32, LEAST)),
        "meta": (single(1, LEAST), single(32, LEAST).to("meta")),
        "other width": (single(1, 2 * LEAST), single(32, LEAST)),
    }
    if c_library.loaded("few_rows") is not None:
        assert suits(single(1, LEAST), single(32, LEAST))
        assert not [name for name, given in in_c.items() if suits(*given)]
    usual = {
        "many rows": (single(FEW + 1, 8), single(32, 8)),
        "bf16": (single(1, 8).bfloat16(), single(32, 8).bfloat16()),
        "fp64": (drawn(1, 8), drawn(32, 8)),
        "no even parts": (single(1, 8), single(33, 8)),
        "transposed": (single(1, 8), single(8, 32).t()),
        "meta": (single(1, 8).to("meta"), single(32, 8).to("meta")),
    }
    assert few(single(1, 8), single(32, 8)) and not [name for name, given in usual.items() if few(*given)]
    assert all(linear(x, weight).shape == (len(x), len(weight)) for x, weight in usual.values())


@needs_compiler
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_operators_that_are_counted_or_traced_are_torchs() -> None:
    with FlopCounterMode(display=False) as counter:
        linear(single(1, LEAST), single(32, LEAST))
    assert counter.get_total_flops() == 2 * 32 * LEAST
    weight, x = single(32, LEAST), single(2, LEAST, seed=3)
    traced = torch.jit.trace(lambda x: linear(x, weight), single(2, LEAST), check_trace=False)
    torch.testing.assert_close(traced(x), F.linear(x, weight), rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_a_library_of_one_thread_leaves_several_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "loaded", lambda name: SimpleNamespace(in_parallel=lambda: 0))
    c_library._computes.cache_clear()
    for n, taken in ((1, True), (2, False)):
        with threads(n):
            assert suits(single(1, LEAST), single(32, LEAST)) is taken
    c_library._computes.cache_clear()


PROGRAM = """
import torch
from blockwright.blocks.kernels import products
from blockwright.blocks.kernels.products import linear
products.use(products.Choice(few_rows={4: ("mkl",)}))
torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # as new programs do; the older function then raises
with torch.no_grad():
    linear(torch.ones(1, 8), torch.ones(32, 8))
print(torch.backends.mkldnn.matmul.fp32_precision)
"""


@pytest.mark.slow
def test_either_way_to_set_the_precision_is_minded(environment: dict[str, str]) -> None:
    env = {**environment, "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
    assert done.stdout == "bf16\n", done.stderr


def test_gradients_compilers_and_autocast_go_the_usual_way() -> None:
    x, weight = single(1, 8), single(32, 8)
    assert not few(x, weight)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert not few(x, weight) and linear(x, weight).dtype == torch.bfloat16
        graph = torch.compile(linear, fullgraph=True, backend="eager")  # a way with a setting in it has no graph
        torch.testing.assert_close(graph(x, weight), F.linear(x, weight))


def test_linear_is_torchs_with_its_names_and_its_gradients() -> None:
    ours, theirs = Linear(8, 32), nn.Linear(8, 32)
    theirs.load_state_dict(ours.state_dict())
    x = single(3, 8).requires_grad_()
    found = [(y, torch.autograd.grad(y.sum(), x)[0]) for y in (ours(x), theirs(x))]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(ours(x[:1]), theirs(x[:1]))
