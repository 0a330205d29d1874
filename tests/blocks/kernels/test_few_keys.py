"""Attention to the few keys that are seen, against that on all keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockwright.blocks.compose import compose
from blockwright.blocks.kernels import few_keys
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.few_keys import attend_few, few, taken
from blockwright.blocks.kernels.latent_attention import latent_attention, latent_attention_reference
from blockwright.blocks.kernels.scoring import Scoring

# B, T, S, N, K, H, keys that a query sees at most
SIZES = [(2, 7, 43, 4, 2, 9, 5), (1, 1, 21, 3, 1, 8, 5), (3, 5, 40, 2, 2, 6, 1), (1, 33, 90, 6, 3, 4, 18)]
DTYPES = [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)]


@pytest.fixture(autouse=True)
def few_are_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that sequences can be short."""
    for name, value in (("PART", 4), ("PART_OF_SEVERAL", 4), ("LEAST", 1)):
        monkeypatch.setattr(few_keys, name, value)


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


@pytest.mark.parametrize("heads", ["one bias", "a bias each"])
@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_equals_attention_on_all_keys(
    sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few_keys, "GATHERED", {"cpu": 2**11})  # some queries at a time
    B, T, S, N, K, H, most = sizes
    draw = torch.Generator().manual_seed(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H + 2), (B, N if heads == "a bias each" else 1, T, S))
    q, k, v, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    bias = bias.masked_fill(~seen_by(B, T, S, most)[:, None], float("-inf"))
    with torch.no_grad():
        found = attend_few(
            lambda q, stored, bias: causal_attention_reference(*q, *stored, Scoring(0.3, bias)), (q,), (k, v), bias
        )
        wide = (t.double() for t in (q, k, v))
        expected = causal_attention_reference(*wide, Scoring(0.3, bias.double()))
        assert found is not None and found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)

        memory = torch.cat((k[:, :, 0], v[:, :, 0, :2]), -1)
        queries = torch.cat((q, q[..., :2]), -1)
        latents = attend_few(
            lambda q, stored, bias: latent_attention(*q, stored[0], stored[0].shape[1], H, 0.3, bias),
            *((queries,), (memory,), bias),
        )
        slow = latent_attention_reference(queries.double(), memory.double(), S, H, 0.3, bias.double())
        assert latents is not None
        torch.testing.assert_close(latents.double(), slow, rtol=0, atol=tolerance)


def test_indices_are_those_of_the_keys_seen() -> None:
    seen = seen_by(2, 5, 60, 9)
    with torch.no_grad():
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
        monkeypatch.setattr(few_keys, "LEAST", 42)
        assert few(seen) is None
        monkeypatch.setattr(few_keys, "LEAST", 41)
        assert few(seen) is not None
        monkeypatch.setattr(few_keys, "PART_OF_SEVERAL", 5)
        assert few(seen) is None and few(seen, 4) is not None and few(seen[:, :1]) is not None
    assert few(seen) is None


ATTENTIONS: dict[str, dict[str, Any]] = {
    "mla": {"name": "mla", "n_heads": 3, "kv_lora_rank": 10, "selector": {"name": "dsa", "n_heads": 2, "top_k": 3}},
    "gqa": {"name": "gqa", "n_heads": 4, "selector": {"name": "dsa", "n_heads": 2, "top_k": 3}},
    "shared_kv": {"name": "shared_kv", "n_heads": 4, "window": 5, "compressor": {"name": "csa", "top_k": 2}},
}
ATTENTIONS["shared_kv"]["compressor"] |= {"every": 2, "n_heads": 2, "head_dim": 8}


@torch.no_grad()
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_a_model_gathers_and_gives_the_logits_of_all_scores(
    name: str, position: str, tiny: Callable[..., Any], randomise: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long parts of a prompt and single tokens, rows of several lengths."""
    decoder = compose(tiny(max_positions=128, attention=ATTENTIONS[name], position=position)).double().eval()
    randomise(decoder)
    draw, padding = torch.Generator().manual_seed(2), torch.tensor([0, 7, 2])
    # Each token once: without positions two equal ones can tie but for rounding, and the later is chosen or not.
    ids = torch.stack([torch.randperm(61, generator=draw) for _ in range(3)])
    gathered, found = [], {}

    def counted(keys: Tensor, index: Tensor) -> Tensor:
        gathered.append(index.shape)
        return taken(keys, index)

    monkeypatch.setattr(few_keys, "taken", counted)
    monkeypatch.setattr("blockwright.blocks.attention.sources.taken", counted)
    for least in (1, 1000):
        monkeypatch.setattr(few_keys, "LEAST", least)
        caches = decoder.new_caches(3, 61, padding=padding)
        found[least] = torch.cat([decoder(t, caches=caches) for t in ids.split([30, 20, 1, 1, 9], 1)], 1)
        assert bool(gathered) == (least == 1)
        gathered.clear()
    hidden = torch.arange(61) < padding[:, None]
    assert torch.equal(found[1].isfinite().all(-1), torch.ones_like(hidden))
    torch.testing.assert_close(found[1][~hidden], found[1000][~hidden], rtol=0, atol=1e-12)
