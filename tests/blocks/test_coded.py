"""Attention to a quantised cache: its codes are read where they can be, and what is read changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pairwise import each
from torch import Tensor

from blockwright.blocks.cache.base import Cache, Quantised
from blockwright.blocks.cache.fixed import Ring
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.choice import Kernels
from blockwright.blocks.kernels.coded_attention import BITS
from tests.blocks.small import decoder, ids, in_parts

MLA = {"name": "mla", "n_heads": 3, "kv_lora_rank": 20, "qk_rope_head_dim": 6, "q_lora_rank": 12}
GQA = {"name": "gqa", "n_heads": 6, "n_kv_heads": 2}
WINDOW = {"name": "sliding_window", "n_heads": 6, "n_kv_heads": 2}
READ: dict[str, dict[str, Any]] = {
    "gqa": {"attention": GQA},
    "mha, learnt positions": {"attention": {"name": "mha", "n_heads": 3}, "position": "learned"},
    "gqa, slopes": {"attention": GQA, "position": "alibi"},
    "gqa, rotated, normalised": {"attention": {**GQA, "qk_norm": "full"}},
    "mla": {"attention": MLA},
    "window": {"attention": {**WINDOW, "window": 5}},
    "window, never full": {"attention": {**WINDOW, "window": 60}},
}
NOT_READ: dict[str, dict[str, Any]] = {
    "selector": {**MLA, "selector": {"name": "dsa", "n_heads": 2, "head_dim": 8, "top_k": 4}},
    "soft cap": {**GQA, "scores": {"name": "softcap"}},
    "one tensor for keys and values": {"name": "grouped_tied", "n_heads": 6, "n_kv_heads": 2},
}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A name for each time that codes were read, and that a whole cache was dequantised."""
    calls, attend, read = list[str](), Kernels.attend_codes, Quantised.read
    monkeypatch.setattr(Kernels, "attend_codes", lambda *given: calls.append("codes") or attend(*given))
    monkeypatch.setattr(Quantised, "read", lambda *given: calls.append("whole") or read(*given))
    return calls


def built(model: dict[str, Any], dtype: torch.dtype = torch.float32) -> Decoder:
    return decoder(dtype, seed=3, init={"std": 0.006}, **model)


@torch.inference_mode()
def states(made: Decoder, chunks: Sequence[int], bits: int, padding: Any = None, *, whole: bool = False) -> Tensor:
    """Hidden states [2,T,D] of tokens that are read in chunks, off codes or ``whole``, off dequantised caches."""
    made.choose_kernels({"coded_attention": "whole" if whole else "auto"})
    return in_parts(made, ids(sum(chunks), seed=1), chunks, made.new_caches(2, sum(chunks), bits, padding))


def off(found: Tensor, right: Tensor) -> float:
    return float((found - right).float().norm() / right.float().norm())


@pytest.mark.parametrize(("name", "bits"), each(list(READ), BITS))
def test_what_is_read_as_codes_is_what_dequantised_caches_give(name: str, bits: int, counted: list[str]) -> None:
    made = built(READ[name])
    for padding, chunks in ((None, [1] * 9), (torch.tensor([0, 4]), (9, 1, 1, 3, 1, 1, 1, 7, 1))):
        found = states(made, chunks, bits, padding)
        assert padding is not None or counted == ["codes"] * 18  # no step dequantises a cache
        right, real = states(made, chunks, bits, padding, whole=True), slice(0 if padding is None else 4, None)
        # A value between two codes may round either way in the second layer: the first tokens cannot.
        assert off(found[:, real], right[:, real]) < 1e-3
        assert (found - right)[:, real].abs().median() < 1e-6


@pytest.mark.parametrize("name", ["gqa", "mla", "window"])
def test_in_bf16(name: str) -> None:
    made, exact = built(READ[name], torch.bfloat16), built(READ[name])
    exact.load_state_dict(made.state_dict())
    chunks = (9, *[1] * 8)
    right = states(exact, chunks, 8, whole=True)
    assert off(states(made, chunks, 8), right) < 1.2 * off(states(made, chunks, 8, whole=True), right) + 1e-3


def test_others_many_queries_and_exact_caches_are_read_as_before(counted: list[str]) -> None:
    for node in NOT_READ.values():
        made = built({"attention": node})
        assert torch.equal(*(states(made, (9, *[1] * 8), 6, whole=whole) for whole in (False, True)))
        assert set(counted) == {"whole"}
    counted.clear()
    made = built(READ["gqa"])
    states(made, (9,), 6)
    assert counted == ["whole"] * 4
    with torch.inference_mode():
        made.hidden(ids(1, 1), caches=made.new_caches(1, 4))
    assert counted == ["whole"] * 4


def test_a_cache_that_stores_in_its_own_way_gives_no_codes() -> None:
    class Other(Cache):
        def store(self, *new: Tensor) -> None:
            super().store(*(-t for t in new))

    made = ({"k": (8,)}, torch.float32, torch.device("cpu"))
    assert Cache(1, 4, *made, bits=6).gives_codes(1) and not Cache(1, 4, *made).gives_codes(1)
    assert not Other(1, 4, *made, bits=6).gives_codes(1)
    assert Ring(1, 4, *made, bits=6).gives_codes(1) and not Ring(1, 4, *made, bits=6).gives_codes(2)
