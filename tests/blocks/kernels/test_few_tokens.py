"""The recurrence over a few tokens in C: that of the formula, after each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels import c_library, few_tokens
from blockwright.blocks.kernels.few_tokens import FEW, LANES, after_each, recurrence_of_few, suits
from blockwright.blocks.kernels.recurrence import recurrence_reference

pytestmark = pytest.mark.skipif(c_library.loaded("few_tokens") is None, reason="no C compiler here")

WIDE = {"B": 2, "T": 3, "N": 8, "K": 32, "V": 64}


def drawn(
    B: int, T: int, N: int, K: int, V: int, *, channels: int = 1, delta: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments of the recurrence."""
    draws = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float32)

    q, k, v = (F.normalize(draw(B, T, N, width), dim=-1).to(dtype) for width in (K, K, V))
    beta = draw(B, T, N).sigmoid() if delta else None
    return {"q": q, "k": k, "v": v, "decay": -draw(B, T, N, channels).exp(), "beta": beta, "state": draw(B, N, K, V)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize(
    ("B", "T", "N", "K", "V", "channels"),
    [(1, 1, 1, 1, LANES, 1), (2, 3, 5, 37, 3 * LANES, 37), (3, FEW, 3, 9, 2 * LANES, 1), (1, 2, 8, 64, 64, 64)],
)
@torch.no_grad()
def test_it_is_the_formula_after_each_token(
    B: int, T: int, N: int, K: int, V: int, channels: int, delta: bool, dtype: torch.dtype, threads: int
) -> None:
    given, before = drawn(B, T, N, K, V, channels=channels, delta=delta, dtype=dtype), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y, states = after_each(**given)
    finally:
        torch.set_num_threads(before)
    assert y.dtype == dtype and states.shape == (B, T, N, K, V) and states.dtype == torch.float32
    exact = {name: t if t is None else t.double() for name, t in given.items()}
    for t in range(T):
        some = {name: x if x is None or name == "state" else x[:, : t + 1] for name, x in exact.items()}
        right, state = recurrence_reference(**some)
        torch.testing.assert_close(states[:, t].double(), state, rtol=1e-5, atol=1e-5)
        tight = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        torch.testing.assert_close(y[:, t].double(), right[:, t], **tight)
    last, state = recurrence_of_few(**given)
    assert torch.equal(last, y) and torch.equal(state, states[:, -1])


@pytest.mark.parametrize("elsewhere", [False, True])
@torch.no_grad()
def test_it_erases_apart_from_writing(elsewhere: bool) -> None:
    given = {**drawn(2, 4, 5, 37, 3 * LANES, channels=37), "beta": None}
    draws = torch.Generator().manual_seed(1)
    erase, at = (F.normalize(torch.randn(2, 4, 5, 37, generator=draws), dim=-1) for _ in range(2))
    more = {"erase": erase, "at": at if elsewhere else None}
    y, states = after_each(**given, **more)
    exact = {name: t if t is None else t.double() for name, t in {**given, **more}.items()}
    for t in range(4):
        some = {name: x if x is None or name == "state" else x[:, : t + 1] for name, x in exact.items()}
        right, state = recurrence_reference(**some)
        torch.testing.assert_close(states[:, t].double(), state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y[:, t].double(), right[:, t], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_numbers_may_lie_anywhere_and_rows_are_those_of_each_alone() -> None:
    given = drawn(**WIDE)
    y, states = after_each(**given)
    apart = {n: t if n == "state" else t.transpose(1, 2).contiguous().transpose(1, 2) for n, t in given.items()}
    apart["state"] = given["state"].transpose(0, 1).contiguous().transpose(0, 1)
    assert all(map(torch.equal, after_each(**apart), (y, states)))
    for row in range(len(y)):
        alone = after_each(**{name: t[row : row + 1] for name, t in given.items()})
        assert torch.equal(alone[0][0], y[row]) and torch.equal(alone[1][0], states[row])


@torch.no_grad()
def test_it_takes_a_few_tokens_in_plain_numbers_and_nothing_else() -> None:
    given = drawn(**WIDE)
    assert suits(**given) and suits(**{**given, "beta": None}) and suits(**drawn(**WIDE, dtype=torch.bfloat16))
    refused = [
        {**given, "state": None},
        {**given, "segments": torch.zeros(2, 3)},
        {**given, "state": given["state"].double(), "v": given["v"].double()},
        {**given, "state": torch.nn.Parameter(given["state"])},
        {name: t.to("meta") for name, t in given.items()},
        drawn(**{**WIDE, "T": FEW + 1}),
        drawn(**{**WIDE, "V": 65}),
        drawn(**{**WIDE, "N": 1}),
    ]
    assert not any(suits(**each) for each in refused)
    with torch.enable_grad():
        assert not suits(**given)
    with FlopCounterMode(display=False):
        assert not suits(**given)


def decoder(name: str, **more: Any) -> Decoder:
    around = {"vocab_size": 61, "d_model": 256, "n_layers": 2, "ffn": {"name": "swiglu", "d_ff": 64}, "norm": "rmsnorm"}
    model = {**around, "max_positions": 64, "residual": "prenorm", "position": "none"}
    return compose({**model, "attention": {"name": name, **more}}, seed=1).choose_kernels().eval()


@pytest.mark.parametrize("name", ["gated_delta", "kda", "mamba2", "lightning", "gated_delta_2", "rwkv7"])
@torch.inference_mode()
def test_models_decode_by_it_and_keep_their_state_after_each_token(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "LEAST", 1)
    made, calls = decoder(name), list[int]()
    assert all(isinstance(layer.attention, Recurrent) for layer in made.layers)
    text = torch.arange(12)[None]

    def read() -> list[Tensor]:
        """States after a token, after three that were checked of which two count, and after a last one."""
        caches = made.new_caches(1, 20)
        states = [made.hidden(text[:, :1], caches=caches)[0]]
        marks = [cache.mark(3) for cache in caches]
        states.append(made.hidden(text[:, 1:4], caches=caches)[0])
        for cache, mark in zip(caches, marks, strict=True):
            cache.rewind(mark, torch.tensor([2]))
        return [*states, made.hidden(text[:, 3:4], caches=caches)[0]]

    def noted(*given: Any) -> tuple[Tensor, Tensor]:
        calls.append(given[2].shape[1])
        return after_each(*given)

    monkeypatch.setattr(few_tokens, "after_each", noted)
    in_c = read()
    assert calls == [1, 1, 3, 3, 1, 1]
    monkeypatch.setattr(few_tokens, "_has_library", lambda threads: False)
    for got, right in zip(in_c, read(), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    assert len(calls) == 6
