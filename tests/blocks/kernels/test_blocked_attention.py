"""Attention block by block computes what the reference says, and looks at no key that it need not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each, pairs
from torch import Tensor

from blockwright.blocks.kernels import blocked_attention as module
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.blocked_attention import blocked_attention
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.scoring import Scoring

# B, T, N, K, H, V; a block holds 16 queries in these tests
SHAPES = {
    "one block": (2, 13, 4, 4, 6, 6),
    "last block is short": (2, 37, 4, 2, 10, 6),
    "whole blocks, one KV head": (1, 48, 3, 1, 5, 9),
    "one token": (3, 1, 2, 2, 4, 4),
    "three sequences": (3, 20, 2, 2, 4, 4),
}
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 4e-2)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_queries", lambda T: 16)


def inputs(shape: str, dtype: torch.dtype) -> list[Tensor]:
    B, T, N, K, H, V = SHAPES[shape]
    torch.manual_seed(0)
    return [torch.randn(B, T, n, w, dtype=dtype, requires_grad=True) for n, w in ((N, H), (K, H), (K, V))]


def options(shape: str, asked: str, dtype: torch.dtype) -> dict[str, Any]:
    B, T, N, *_ = SHAPES[shape]
    torch.manual_seed(1)
    ids = torch.randint(0, 4, (B, T)).sort(-1).values
    return {
        "plain": {},
        "bias": {"bias": torch.randn(1, N, T, T, dtype=dtype)},
        "bias of each sequence": {"bias": torch.randn(B, N, T, T, dtype=dtype)},
        "window": {"window": 7},
        "window wider than a block": {"window": 21},
        "documents": {"segments": ids},
        "documents that come again": {"segments": torch.randint(0, 3, (B, T))},
        "all": {"segments": ids, "window": 5, "bias": torch.randn(1, N, T, T, dtype=dtype)},
    }[asked]


ASKED = ("plain", "bias", "bias of each sequence", "window", "window wider than a block", "documents")
ASKED = (*ASKED, "documents that come again", "all")


@pytest.mark.parametrize(("asked", "shape", "kept"), pairs(list(ASKED), list(SHAPES), [64, 0]))
def test_blocks_and_their_gradients_equal_the_reference(
    kept: int, shape: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEPT", kept)
    for dtype, tolerance in PRECISIONS:
        given, chosen = inputs(shape, dtype), options(shape, asked, dtype)
        wide = [t.detach().double().requires_grad_() for t in given]
        chosen_wide = {k: v.double() if k == "bias" else v for k, v in chosen.items()}
        y = blocked_attention(*given, Scoring(0.3, **chosen))
        expected = causal_attention_reference(*wide, Scoring(0.3, **chosen_wide))
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=tolerance)
        cotangent = torch.randn_like(expected)
        got = torch.autograd.grad(y, given, cotangent.to(dtype))
        for one, other in zip(got, torch.autograd.grad(expected, wide, cotangent.to(dtype).double()), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(
    ("asked", "shape", "heads"), pairs(list(ASKED), ["last block is short", "whole blocks, one KV head"], [1, 2, None])
)
def test_last_queries_on_more_keys_and_some_heads_at_a_time_equal_the_reference(
    heads: int | None, shape: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if heads is not None:
        monkeypatch.setattr(module, "LONGEST", 0)
        monkeypatch.setattr(module, "MOST", heads * 16 * SHAPES[shape][1] * 8)
    q, k, v = inputs(shape, torch.float64)
    chosen, last = options(shape, asked, torch.float64), 19
    q = q[:, -last:].detach().requires_grad_()
    if "bias" in chosen:
        chosen["bias"] = chosen["bias"][:, :, -last:]
    y, expected = (f(q, k, v, Scoring(0.3, **chosen)) for f in (blocked_attention, causal_attention_reference))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(t, (q, k, v), cotangent) for t in (y, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("together", [1, 2, 3])
def test_sequences_that_go_together_give_the_same(together: int, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, chosen = inputs("three sequences", torch.float64), options("three sequences", asked, torch.float64)
    monkeypatch.setattr(module, "SCORES", together * 2 * 16 * 20 * 8)
    starts = {block.sequences.start for block in module._blocks(given[0], 20, chosen.get("segments"), None)}
    assert len(starts) == (3 if "segments" in chosen else -(-3 // together))
    y = blocked_attention(*given, Scoring(0.3, **chosen))
    expected = causal_attention_reference(*given, Scoring(0.3, **chosen))
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    cotangent = torch.randn_like(y)
    got, due = (torch.autograd.grad(out, given, cotangent) for out in (y, expected))
    torch.testing.assert_close(got, due, rtol=0, atol=1e-11)


def test_weights_are_kept_up_to_a_length_and_computed_anew_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: dict[int, list[int]] = {48: [], 47: []}

    for kept, widths in saved.items():

        def note(tensor: Tensor, widths: list[int] = widths) -> Tensor:
            widths.append(tensor.shape[-1])
            return tensor

        monkeypatch.setattr(module, "KEPT", kept)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            blocked_attention(*inputs("whole blocks, one KV head", torch.float32), Scoring(0.3))
    weights = 3 * 16 * (16 + 32 + 48)  # one sequence of three heads: a block's keys up to its end
    assert saved[48] == [weights if width == 0 else width for width in saved[47]] and 0 in saved[47]


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "kept"), each(list(ASKED), [64, 0]))
def test_compiled_it_is_one_operator_and_the_same(kept: int, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", kept)
    given, chosen = inputs("three sequences", torch.float32), options("three sequences", asked, torch.float32)
    cotangent = torch.randn(3, 20, 2, 4)

    def run(attend: Any) -> list[Tensor]:
        y = attend(*given, Scoring(0.3, **chosen))
        return [y, *torch.autograd.grad(y, given, cotangent)]

    torch._dynamo.reset()
    compiled = run(torch.compile(blocked_attention, fullgraph=True, backend="aot_eager"))
    for got, expected in zip(compiled, run(blocked_attention), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["plain", "all"])
def test_the_operator_keeps_the_rules_of_operators(asked: str) -> None:
    scoring = Scoring(0.3, **options("three sequences", asked, torch.float32))
    rest = (scoring.bias, scoring.segments, scoring.window, scoring.scale)
    given = inputs("three sequences", torch.float32)
    torch.library.opcheck(module._opaque, (*given, *rest, False))
    if asked == "plain":  # where documents are left out, some of the room for weights is never written to
        torch.library.opcheck(module._opaque, (*(t.detach() for t in given), *rest, True))


def test_no_key_of_another_document_or_outside_the_window_is_fetched() -> None:
    q = torch.zeros(1, 64, 1, 2)
    plain = module._blocks(q, 64, None, None)
    assert [(b.keys.start, b.keys.stop) for b in plain] == [(0, 16), (0, 32), (0, 48), (0, 64)]
    windowed = module._blocks(q, 64, None, 5)
    assert [(b.keys.start, b.keys.stop) for b in windowed] == [(0, 16), (12, 32), (28, 48), (44, 64)]
    packed = module._blocks(q, 64, torch.tensor([[0] * 20 + [1] * 30 + [2] * 14]), None)
    assert [(b.keys.start, b.keys.stop) for b in packed] == [(0, 16), (0, 32), (20, 48), (20, 64)]


@pytest.mark.parametrize("T", [module.SHORTEST, module.SHORTEST + 3])
def test_what_blocks_cannot_do_goes_the_other_way_and_is_the_same(T: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, T, 2, 4, dtype=torch.float64) for _ in range(3))
    learned = torch.randn(1, 2, T, T, dtype=torch.float64, requires_grad=True)
    for extra in ({"sinks": torch.randn(2, dtype=torch.float64)}, {"softcap": 2.0}, {"bias": learned}, {}):
        y = Kernels(attention="blocked").attend(q, k, v, Scoring(0.5, **extra))
        torch.testing.assert_close(y, causal_attention_reference(q, k, v, Scoring(0.5, **extra)), rtol=0, atol=1e-12)
        if "bias" in extra:
            (grad,) = torch.autograd.grad(y.sum(), learned)
            assert grad.isfinite().all()


def test_short_whole_sequences_are_blocks_where_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    short, tiny = (torch.zeros(2, T, 2, 4) for T in (module.SHORTEST_BY_ONEDNN, module.SHORTEST_BY_ONEDNN - 1))
    for by_onednn in (True, False):
        monkeypatch.setattr(module, "multiplies_by_onednn", lambda dtype, answer=by_onednn: answer)
        assert module.suits(short, short, short, Scoring(1.0)) == by_onednn
        assert not module.suits(tiny, tiny, tiny, Scoring(1.0))
        assert not module.suits(tiny, short, short, Scoring(1.0))
