"""Linear recurrences over a few tokens in C are those of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from blockwright.blocks.compose import compose
from blockwright.blocks.kernels.recurrence import recurrence_reference
from blockwright.blocks.kernels.seam import chain
from blockwright.plugins.fast_cpu import c_library, few_tokens
from blockwright.plugins.fast_cpu.few_tokens import FEW, after_each, recurrence_of_few, suits
from tests.blocks.kernels.compared import drawn, spy, threads, wide

T, MULTIPLE = 67, c_library.WIDE


def unit(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.normalize(drawn(*shape, seed=seed), dim=-1).to(dtype)


# --- a few tokens in C ------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(c_library.loaded("few_tokens") is None, reason="no C compiler here")
WIDE = {"B": 2, "T": 3, "N": 8, "K": 32, "V": 64}


def few(
    B: int, T: int, N: int, K: int, V: int, channels: int = 1, delta: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of the recurrence."""
    q, k, v = (unit(B, T, N, width, seed=i, dtype=dtype) for i, width in enumerate((K, K, V)))
    beta = drawn(B, T, N, seed=4).sigmoid().float() if delta else None
    decay, state = -drawn(B, T, N, channels, seed=3).exp().float(), drawn(B, N, K, V, seed=5).float()
    return {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "state": state}


def assert_formula_after_each(arguments: dict[str, Any], tolerance: float) -> None:
    y, states = after_each(**arguments)
    exact = wide(arguments)
    for t in range(y.shape[1]):
        some = {name: x if x is None or name == "state" else x[:, : t + 1] for name, x in exact.items()}
        right, state = recurrence_reference(**some)
        torch.testing.assert_close(states[:, t].double(), state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y[:, t].double(), right[:, t], rtol=tolerance, atol=tolerance)


@needs_compiler
@torch.no_grad()
def test_a_few_tokens_are_the_formula_after_each(vectors: None) -> None:
    # B, T, N, K, V, channels
    sizes = [
        (1, 1, 1, 1, MULTIPLE, 1),
        (2, 3, 5, 37, 3 * MULTIPLE, 37),
        (3, FEW, 3, 9, 2 * MULTIPLE, 1),
        (1, 2, 8, 64, 64, 64),
    ]
    for size, delta, dtype, n in pairs(sizes, [True, False], [torch.float32, torch.bfloat16], [1, 3]):
        arguments = few(*size, delta=delta, dtype=dtype)
        with threads(n):
            assert_formula_after_each(arguments, 1e-5 if dtype == torch.float32 else 1e-2)
            y, states = after_each(**arguments)
        assert y.dtype == dtype and states.shape == (*size[:3], *size[3:5]) and states.dtype == torch.float32
        assert all(map(torch.equal, recurrence_of_few(**arguments), (y, states[:, -1])))
    erase, at = unit(2, 4, 5, 37, seed=6).float(), unit(2, 4, 5, 37, seed=7).float()
    for place in (None, at):  # erasing apart from writing
        arguments = {**few(2, 4, 5, 37, 3 * MULTIPLE, 37, delta=False), "erase": erase, "at": place}
        assert_formula_after_each(arguments, 1e-5)


@needs_compiler
@torch.no_grad()
def test_numbers_may_lie_anywhere_and_rows_are_those_of_each_alone() -> None:
    arguments = few(**WIDE)
    y, states = after_each(**arguments)
    apart = {n: t if n == "state" else t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in arguments.items()}
    apart["state"] = arguments["state"].transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, after_each(**apart), (y, states)))
    for row in range(len(y)):
        alone = after_each(**{name: t[row : row + 1] for name, t in arguments.items()})
        assert torch.equal(alone[0][0], y[row]) and torch.equal(alone[1][0], states[row])


@needs_compiler
@torch.no_grad()
def test_it_takes_a_few_tokens_in_plain_numbers_and_nothing_else() -> None:
    plain = few(**WIDE)
    assert suits(**plain) and suits(**{**plain, "beta": None}) and suits(**few(**WIDE, dtype=torch.bfloat16))
    refused = [
        {**plain, "state": None},
        {**plain, "segments": torch.zeros(2, 3)},
        {**plain, "state": plain["state"].double(), "v": plain["v"].double()},
        {name: t.to("meta") for name, t in plain.items()},
        *(few(**{**WIDE, **changed}) for changed in ({"T": FEW + 1}, {"V": 65}, {"N": 1})),
    ]
    assert not any(suits(**each) for each in refused)
    with torch.enable_grad():
        assert not suits(**plain)
    with FlopCounterMode(display=False):
        assert not suits(**plain)


@needs_compiler
@pytest.mark.parametrize("name", ["gated_delta", "kda", "mamba2", "lightning", "gated_delta_2", "rwkv7"])
@torch.inference_mode()
def test_models_decode_by_it_and_keep_their_state_after_each_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "LEAST", 1)
    model: dict[str, Any] = {"vocab_size": 61, "d_model": 256, "n_layers": 2, "norm": "rmsnorm", "residual": "prenorm"}
    model |= {"attention": name, "ffn": {"name": "swiglu", "d_ff": 64}, "max_positions": 64, "position": "none"}
    calls = spy(monkeypatch, "recurrence", "recurrence_each")
    made, text = compose(model, seed=1).choose_kernels().eval(), torch.arange(12)[None]

    def read() -> list[Tensor]:
        """States after a token, after three that were checked of which two count, and after a last one."""
        caches = made.new_caches(1, 20)
        states = [made.hidden(text[:, :1], caches=caches)[0]]
        marks = [cache.mark(3) for cache in caches]
        states.append(made.hidden(text[:, 1:4], caches=caches)[0])
        for cache, mark in zip(caches, marks, strict=True):
            cache.rewind(mark, torch.tensor([2]))
        return [*states, made.hidden(text[:, 3:4], caches=caches)[0]]

    in_c = read()
    assert [(name, given[2].shape[1]) for name, given in calls] == [("few_tokens", n) for n in (1, 1, 3, 3, 1, 1)]
    calls.clear()
    made.choose_kernels({"recurrence": "torch"})
    torch.testing.assert_close(in_c, read(), rtol=1e-4, atol=1e-4)
    assert {name for name, _ in calls} == {"torch"}  # which was named, also after each token of a draft
    calls.clear()
    made.choose_kernels()
    monkeypatch.setattr(c_library, "_computes", lambda name, threads: False)
    torch.testing.assert_close(in_c, read(), rtol=1e-4, atol=1e-4)
    assert "few_tokens" not in [name for name, _ in calls]
    chain.cache_clear()
