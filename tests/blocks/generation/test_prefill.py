"""Of the last layer, reading a prompt computes the last token alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose
from blockwright.blocks.ffn.swiglu import SwiGLU
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.generation.generate import prefill
from blockwright.registry import register

DSA = {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4}
AROUND: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 48,
    "n_layers": 2,
    "max_positions": 64,
    "init": {"std": 0.2},
    "position": "rope",
    "norm": "rmsnorm",
    "residual": "prenorm",
    "ffn": {"name": "swiglu", "d_ff": 24},
}
MODELS: dict[str, dict[str, Any]] = {
    "latents": {"attention": "mla"},
    "window": {"attention": {"name": "sliding_window", "window": 5}},
    "values and a gate": {"attention": "gqa", "values": "value_residual", "output_gate": "per_head"},
    "over depth": {"attention": "depth"},
    "chosen": {"attention": {"name": "mla", "selector": DSA}},
    "chosen below": {"attention": {"name": "gqa", "selector": {"name": "shared", "every": 2, "of": DSA}}},
    "a state": {"attention": "gated_delta"},
    "streams": {"attention": "differential", "residual": "mhc"},
    "routed by id": {
        "attention": "gqa",
        "ffn": {"name": "moe", "n_experts": 4},
        "gating": {"name": "hash", "top_k": 2},
        "experts": {"name": "swiglu", "d_ff": 8},
    },
    "ffn that reads below": {"attention": "gqa", "ffn": "reading"},
}


@pytest.fixture(autouse=True)
def reading(temporary_blocks: None) -> None:
    @register("ffn", "reading")
    class Reading(SwiGLU):
        """Adds the input of the first layer's."""

        def forward(self, x: Tensor, given: Pass | None = None) -> tuple[Tensor, None]:
            first = x if given is None or given.carry is None else given.carry.setdefault("first", x)
            return super().forward(x + first)[0], None


@pytest.mark.parametrize(
    ("name", "bits", "padding"), each(list(MODELS), [None, 4, None, 4], [None, (0, 9), (0, 9), None])
)
@torch.no_grad()
def test_logits_and_caches_are_those_of_the_whole(name: str, bits: int | None, padding: Any) -> None:
    decoder = compose({**AROUND, **MODELS[name]}, seed=2).double().eval()
    ids = torch.randint(61, (2, 41), generator=torch.Generator().manual_seed(1))
    rows = None if padding is None else torch.tensor(padding)
    ours, right = (decoder.new_caches(2, 41, bits, rows) for _ in range(2))
    for part in ids.split([20, 1, 13, 7], 1):
        wanted = decoder.logits(decoder.hidden(part, caches=right)[0][:, -1]).float()
        torch.testing.assert_close(prefill(decoder, part, ours), wanted, rtol=0, atol=1e-5)
    for mine, other in zip(ours, right, strict=True):
        assert mine.length == other.length == 41
        for buffer, wanted in zip(mine.buffers.values(), other.buffers.values(), strict=True):
            torch.testing.assert_close(buffer.double(), wanted.double(), rtol=0, atol=1e-9)


def test_cache_that_hides_padding_in_its_own_way_shares_no_mask() -> None:
    class Seeing(Cache):
        def padding_bias(self, n_new: int) -> Tensor | None:
            found = super().padding_bias(n_new)
            return None if found is None else torch.zeros_like(found)

    caches = [cls(2, 8, {"k": (3,)}, torch.float32, torch.device("cpu")) for cls in (Cache, Seeing)]
    assert [cache.alike() is None for cache in caches] == [False, True]
