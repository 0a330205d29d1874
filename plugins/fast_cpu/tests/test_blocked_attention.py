"""Attention block by block computes what the reference says, and looks at no key that it need not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from pairwise import each, pairs
from torch import Tensor

from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.scoring import Scoring
from blockwright.plugins.fast_cpu import blocked_attention as module
from blockwright.plugins.fast_cpu.blocked_attention import blocked_attention
from tests.blocks.kernels.compared import PRECISIONS, assert_compiles, assert_same, drawn, leaves, wide

# B, T, N, K, H, V; a block holds 16 queries in these tests
SHAPES = {
    "one block": (2, 13, 4, 4, 6, 6),
    "last block is short": (2, 37, 4, 2, 10, 6),
    "whole blocks, one KV head": (1, 48, 3, 1, 5, 9),
    "one token": (3, 1, 2, 2, 4, 4),
    "three sequences": (3, 20, 2, 2, 4, 4),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_queries", lambda T: 16)


def inputs(shape: str, dtype: torch.dtype) -> list[Tensor]:
    B, T, N, K, H, V = SHAPES[shape]
    return leaves((B, T, N, H), (B, T, K, H), (B, T, K, V), dtype=dtype)


ASKED = ["plain", "bias", "bias of each sequence", "window", "window wider than a block", "documents"]
ASKED += ["documents that come again", "all"]


def options(shape: str, asked: str, dtype: torch.dtype) -> dict[str, Any]:
    B, T, N, *_ = SHAPES[shape]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 4, (B, T), generator=draw)
    ordered = ids.sort(-1).values
    return {
        "plain": {},
        "bias": {"bias": drawn(1, N, T, T, dtype=dtype)},
        "bias of each sequence": {"bias": drawn(B, N, T, T, dtype=dtype)},
        "window": {"window": 7},
        "window wider than a block": {"window": 21},
        "documents": {"segments": ordered},
        "documents that come again": {"segments": ids},
        "all": {"segments": ordered, "window": 5, "bias": drawn(1, N, T, T, dtype=dtype)},
    }[asked]


def compare(given: list[Tensor], chosen: dict[str, Any], tolerance: float) -> None:
    ours, right = Scoring(0.3, **chosen), Scoring(0.3, **wide(chosen))
    call, reference = (lambda *t: blocked_attention(*t, ours)), (lambda *t: causal_attention_reference(*t, right))
    assert_same(call, reference, given, tolerance)


def test_blocks_and_their_gradients_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, shape, kept, (dtype, tolerance) in pairs(ASKED, list(SHAPES), [64, 0], list(PRECISIONS.items())):
        monkeypatch.setattr(module, "KEPT", kept)
        compare(inputs(shape, dtype), options(shape, asked, dtype), tolerance)


@pytest.mark.parametrize("asked", ASKED)
def test_last_queries_and_some_heads_or_sequences_at_a_time_equal_the_reference(
    asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for together in (1, 2, 3):
        given, chosen = inputs("three sequences", torch.float64), options("three sequences", asked, torch.float64)
        monkeypatch.setattr(module, "SCORES", together * 2 * 16 * 20 * 8)
        starts = {block.sequences.start for block in module._blocks(given[0], 20, chosen.get("segments"), None)}
        assert len(starts) == (3 if "segments" in chosen else -(-3 // together))
        compare(given, chosen, 1e-12)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_queries", lambda T: 16)
    for heads, shape in itertools.product([None, 1, 2], ["last block is short", "whole blocks, one KV head"]):
        if heads is not None:
            monkeypatch.setattr(module, "LONGEST", 0)
            monkeypatch.setattr(module, "MOST", heads * 16 * SHAPES[shape][1] * 8)
        q, k, v = inputs(shape, torch.float64)
        chosen = options(shape, asked, torch.float64)
        if "bias" in chosen:
            chosen["bias"] = chosen["bias"][:, :, -19:]
        compare([q[:, -19:].detach().requires_grad_(), k, v], chosen, 1e-12)


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
@pytest.mark.parametrize(("asked", "kept"), each(ASKED, [64, 0]))
def test_compiled_it_is_one_operator_and_the_same(kept: int, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", kept)
    scoring = Scoring(0.3, **options("three sequences", asked, torch.float32))
    assert_compiles(lambda *t: blocked_attention(*t, scoring), inputs("three sequences", torch.float32))


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
    packed = torch.tensor([[0] * 20 + [1] * 30 + [2] * 14])
    for segments, window, right in (
        (None, None, [(0, 16), (0, 32), (0, 48), (0, 64)]),
        (None, 5, [(0, 16), (12, 32), (28, 48), (44, 64)]),
        (packed, None, [(0, 16), (0, 32), (20, 48), (20, 64)]),
    ):
        blocks = module._blocks(torch.zeros(1, 64, 1, 2), 64, segments, window)
        assert [(b.keys.start, b.keys.stop) for b in blocks] == right


def test_what_blocks_cannot_do_goes_the_other_way_and_is_the_same() -> None:
    T = module.SHORTEST
    q, k, v = (drawn(1, T, 2, 4, seed=i) for i in range(3))
    learned = drawn(1, 2, T, T).requires_grad_()
    for extra in ({"sinks": drawn(2)}, {"softcap": 2.0}, {"bias": learned}, {}):
        scoring = Scoring(0.5, **extra)
        y = Kernels(attention="blocked").attend(q, k, v, scoring)
        torch.testing.assert_close(y, causal_attention_reference(q, k, v, scoring), rtol=0, atol=1e-12)
        if "bias" in extra:
            (grad,) = torch.autograd.grad(y.sum(), learned)
            assert grad.isfinite().all()


def test_short_whole_sequences_are_blocks_where_onednn_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    short, tiny = (torch.zeros(2, T, 2, 4) for T in (module.SHORTEST_BY_ONEDNN, module.SHORTEST_BY_ONEDNN - 1))
    for by_onednn in (True, False):
        monkeypatch.setattr(module, "multiplies_by_onednn", lambda dtype, answer=by_onednn: answer)
        assert module.suits(short, short, short, Scoring(1.0)) == by_onednn
        assert not module.suits(tiny, tiny, tiny, Scoring(1.0)) and not module.suits(tiny, short, short, Scoring(1.0))
