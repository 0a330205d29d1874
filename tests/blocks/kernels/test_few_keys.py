"""Attention to the few keys that are seen, against that on all keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import pairs
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.kernels import long_attention
from blockwright.blocks.kernels.attention import (
    causal_attention_reference,
    latent_attention,
    latent_attention_reference,
)
from blockwright.blocks.kernels.long_attention import attend_few, few, taken
from blockwright.blocks.kernels.scoring import Scoring
from tests.blocks.kernels.compared import TIGHT, drawn, wide

# B, T, S, N, K, H, keys that a query sees at most
SIZES = [(2, 7, 43, 4, 2, 9, 5), (1, 1, 21, 3, 1, 8, 5), (3, 5, 40, 2, 2, 6, 1), (1, 33, 90, 6, 3, 4, 18)]


@pytest.fixture(autouse=True)
def few_are_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sequences can be short."""
    for name, value in (("PART", 4), ("PART_OF_SEVERAL", 4), ("LEAST", 1)):
        monkeypatch.setattr(long_attention, name, value)


def seen_by(B: int, T: int, S: int, most: int) -> Tensor:
    """[B,T,S]: between 1 and ``most`` keys of each query, none of them later."""
    draw = torch.Generator().manual_seed(1)
    seen = torch.zeros(B, T, S, dtype=torch.bool)
    for b in range(B):
        for t in range(T):
            possible = S - T + t + 1
            n = min(possible, 1 + int(torch.randint(most, (), generator=draw)) if t else most)
            seen[b, t, torch.randperm(possible, generator=draw)[:n]] = True
    return seen


@torch.no_grad()
def test_it_equals_attention_on_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_attention, "GATHERED", {"cpu": 2**11})  # some queries at a time
    for (B, T, S, N, K, H, most), (dtype, tolerance), each in pairs(SIZES, list(TIGHT.items()), [False, True]):
        shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H + 2), (B, N if each else 1, T, S))
        q, k, v, bias = (drawn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))
        bias = bias.masked_fill(~seen_by(B, T, S, most)[:, None], float("-inf"))
        found = attend_few(lambda q, kv, b: causal_attention_reference(*q, *kv, Scoring(0.3, b)), (q,), (k, v), bias)
        expected = causal_attention_reference(wide(q), wide(k), wide(v), Scoring(0.3, wide(bias)))
        assert found is not None and found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)

        memory, queries = torch.cat((k[:, :, 0], v[:, :, 0, :2]), -1), torch.cat((q, q[..., :2]), -1)
        latents = attend_few(
            lambda q, kv, b, H=H: latent_attention(*q, kv[0], kv[0].shape[1], H, 0.3, b), (queries,), (memory,), bias
        )
        slow = latent_attention_reference(wide(queries), wide(memory), S, H, 0.3, wide(bias))
        assert latents is not None
        torch.testing.assert_close(latents.double(), slow, rtol=0, atol=tolerance)


@torch.no_grad()
def test_indices_are_those_of_the_keys_seen() -> None:
    seen = seen_by(2, 5, 60, 9)
    index = few(seen)
    assert index is not None and index.shape == (2, 5, 9)
    found = torch.zeros_like(seen).scatter(-1, index, True)
    assert bool((found >= seen).all())
    keys = torch.randn(2, 60, 3)
    assert torch.equal(taken(keys, index)[7], keys[1, index[1, 2]])  # the third query of the second row
    assert torch.equal(taken(keys[:1], index)[7], keys[0, index[1, 2]])


def test_keys_are_gathered_where_few_are_seen_and_nothing_needs_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = torch.zeros(1, 2, 41, dtype=torch.bool)  # the first query sees 40 at most
    seen[0, 0, 3:13] = seen[0, 1, 0] = True
    with torch.no_grad():
        assert few(seen) is not None
        seen[0, 0, 20] = True
        assert few(seen) is None
        seen[0, 0, 20] = False
        monkeypatch.setattr(long_attention, "LEAST", 42)
        assert few(seen) is None
        monkeypatch.setattr(long_attention, "LEAST", 41)
        assert few(seen) is not None
        monkeypatch.setattr(long_attention, "PART_OF_SEVERAL", 5)
        assert few(seen) is None and few(seen, 4) is not None and few(seen[:, :1]) is not None
    assert few(seen) is None


DSA = {"name": "dsa", "n_heads": 2, "top_k": 3}
CSA = {"name": "csa", "top_k": 2, "every": 2, "n_heads": 2, "head_dim": 8}
ATTENTIONS: list[tuple[dict[str, Any], str]] = [
    ({"name": "mla", "n_heads": 3, "kv_lora_rank": 10, "selector": DSA}, "rope"),
    ({"name": "gqa", "n_heads": 4, "selector": DSA}, "alibi"),
    ({"name": "shared_kv", "n_heads": 4, "window": 5, "compressor": CSA}, "rope"),
]


@torch.no_grad()
@pytest.mark.parametrize(("attention", "position"), ATTENTIONS, ids=str)
def test_a_model_gathers_and_gives_the_logits_of_all_scores(
    attention: dict[str, Any],
    position: str,
    tiny: Callable[..., Any],
    randomise: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Long parts of a prompt and single tokens, rows of several lengths."""
    decoder = compose(tiny(max_positions=128, attention=attention, position=position)).double().eval()
    randomise(decoder)
    draw, padding = torch.Generator().manual_seed(2), torch.tensor([0, 7, 2])
    # Each token once: without positions two equal ones can tie but for rounding, and the later is chosen or not.
    ids = torch.stack([torch.randperm(61, generator=draw) for _ in range(3)])
    gathered, found = [], {}

    def counted(keys: Tensor, index: Tensor) -> Tensor:
        gathered.append(index.shape)
        return taken(keys, index)

    monkeypatch.setattr(long_attention, "taken", counted)
    monkeypatch.setattr("blockwright.blocks.attention.shared_kv.taken", counted)
    for least in (1, 1000):
        monkeypatch.setattr(long_attention, "LEAST", least)
        caches = decoder.new_caches(3, 61, padding=padding)
        found[least] = torch.cat([decoder(t, caches=caches) for t in ids.split([30, 20, 1, 1, 9], 1)], 1)
        assert bool(gathered) == (least == 1)
        gathered.clear()
    hidden = torch.arange(61) < padding[:, None]
    assert torch.equal(found[1].isfinite().all(-1), torch.ones_like(hidden))
    torch.testing.assert_close(found[1][~hidden], found[1000][~hidden], rtol=0, atol=1e-12)
