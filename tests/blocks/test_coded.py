"""Attention to a quantised cache: its codes are read where they can be, and what is read changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.ring import Ring
from blockwright.blocks.cache.stores import Quantised
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels import choice
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.quantise import BITS

AROUND: dict[str, Any] = {
    "vocab_size": 61,
    "d_model": 48,
    "n_layers": 2,
    "max_positions": 64,
    "ffn": {"name": "swiglu", "d_ff": 16},
    "norm": "rmsnorm",
    "residual": "prenorm",
    "position": "rope",
}
MLA = {"name": "mla", "n_heads": 3, "kv_lora_rank": 20, "qk_rope_head_dim": 6, "q_lora_rank": 12}
GQA = {"name": "gqa", "n_heads": 6, "n_kv_heads": 2}
READ: dict[str, dict[str, Any]] = {
    "gqa": {"attention": GQA},
    "mha, learnt positions": {"attention": {"name": "mha", "n_heads": 3}, "position": "learned"},
    "gqa, slopes": {"attention": GQA, "position": "alibi"},
    "gqa, rotated, normalised": {"attention": {**GQA, "qk_norm": "full"}},
    "mla": {"attention": MLA},
    "window": {"attention": {"name": "sliding_window", "n_heads": 6, "n_kv_heads": 2, "window": 5}},
    "window, never full": {"attention": {"name": "sliding_window", "n_heads": 6, "n_kv_heads": 2, "window": 60}},
}
DSA = {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4}
NOT_READ: dict[str, dict[str, Any]] = {
    "selector": {"attention": {**MLA, "selector": DSA}},
    "soft cap": {"attention": {**GQA, "scores": {"name": "softcap"}}},
    "one tensor for keys and values": {"attention": {"name": "grouped_tied", "n_heads": 6, "n_kv_heads": 2}},
}


class Counted:
    """How often codes were read, and how often a whole cache was dequantised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read = self.dequantised = 0
        attend_codes, read = Kernels.attend_codes, Quantised.read

        def attending(kernels: Kernels, *given: Any) -> Tensor:
            self.read += 1
            return attend_codes(kernels, *given)

        def reading(store: Quantised, where: Any) -> Tensor:
            self.dequantised += 1
            return read(store, where)

        monkeypatch.setattr(choice.Kernels, "attend_codes", attending)
        monkeypatch.setattr(Quantised, "read", reading)


def built(model: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    return compose({**AROUND, **model}, seed=3).to(dtype).eval()


@torch.inference_mode()
def states(
    decoder: Decoder, chunks: Sequence[int], bits: int, padding: Tensor | None = None, *, whole: bool = False
) -> Tensor:
    """Hidden states [2,T,D] of tokens that are read in chunks, off codes or ``whole``, off dequantised caches."""
    decoder.choose_kernels({"coded_attention": "whole" if whole else "auto"})
    ids = torch.randint(61, (2, sum(chunks)), generator=torch.Generator().manual_seed(1))
    caches = decoder.new_caches(2, sum(chunks), bits, padding)
    return torch.cat([decoder.hidden(part, caches=caches)[0] for part in ids.split(list(chunks), 1)], 1)


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).float().norm() / right.float().norm())


@pytest.mark.parametrize(("name", "bits"), each(list(READ), BITS))
def test_what_is_read_as_codes_is_what_dequantised_caches_give(name: str, bits: int) -> None:
    decoder, padding = built(READ[name]), torch.tensor([0, 4])
    by_one, mixed = [1] * 9, (9, 1, 1, 3, 1, 1, 1, 7, 1)
    for given, chunks in ((None, by_one), (padding, mixed)):
        found, right = (states(decoder, chunks, bits, given, whole=whole) for whole in (False, True))
        real = slice(None) if given is None else slice(4, None)
        # A value between two codes may round either way in the second layer: the first tokens cannot.
        assert off(found[:, real], right[:, real]) < 1e-3
        assert (found - right)[:, real].abs().median() < 1e-6


@pytest.mark.parametrize("name", ["gqa", "mla", "window"])
def test_in_bf16(name: str) -> None:
    decoder, exact = built(READ[name], torch.bfloat16), built(READ[name])
    exact.load_state_dict(decoder.state_dict())
    chunks = (9, *[1] * 8)
    right = states(exact, chunks, 8, whole=True)
    assert off(states(decoder, chunks, 8), right) < 1.2 * off(states(decoder, chunks, 8, whole=True), right) + 1e-3


@pytest.mark.parametrize("name", READ)
def test_no_step_dequantises_a_cache(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = built(READ[name])
    counted = Counted(monkeypatch)
    states(decoder, [1] * 12, 6)
    assert (counted.read, counted.dequantised) == (24, 0)


@pytest.mark.parametrize("name", NOT_READ)
def test_others_read_what_they_read_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = built(NOT_READ[name])
    counted = Counted(monkeypatch)
    assert torch.equal(*(states(decoder, (9, *[1] * 8), 6, whole=whole) for whole in (False, True)))
    assert counted.read == 0 < counted.dequantised


def test_many_queries_and_exact_caches_are_read_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = built(READ["gqa"])
    counted = Counted(monkeypatch)
    states(decoder, (9,), 6)
    assert (counted.read, counted.dequantised) == (0, 4)
    with torch.inference_mode():
        decoder.hidden(torch.zeros(1, 1, dtype=torch.int64), caches=decoder.new_caches(1, 4))
    assert counted.read == 0


def test_a_cache_that_stores_in_its_own_way_gives_no_codes() -> None:
    class Other(Cache):
        def store(self, *new: Tensor) -> None:
            super().store(*(-t for t in new))

    made = ({"k": (8,)}, torch.float32, torch.device("cpu"))
    assert Cache(1, 4, *made, bits=6).gives_codes(1) and not Cache(1, 4, *made).gives_codes(1)
    assert not Other(1, 4, *made, bits=6).gives_codes(1)
    assert Ring(1, 4, *made, bits=6).gives_codes(1) and not Ring(1, 4, *made, bits=6).gives_codes(2)
