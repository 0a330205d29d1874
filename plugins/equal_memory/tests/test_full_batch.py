"""A full batch: its memory is what is allocated, and each of its rows decodes what it would decode alone."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pairwise import each, pairs

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.generation.generate import Continuations, prefill
from blockwright.blocks.generation.sample import Sampling
from blockwright.plugins.equal_memory.arm import Cell
from blockwright.plugins.equal_memory.full_batch import FullBatch, allocated
from blockwright.plugins.equal_memory.request import Bits, Settings

KDA = {"name": "kda", "n_heads": 3, "head_dim": 8}
HYBRID = {
    "attention": {"name": "mla", "n_heads": 3},
    "variants": {"attention": {"linear": KDA}},
    "layout": {"attention": "linear attention"},
}
MODELS: dict[str, dict[str, Any]] = {
    "mha": {"attention": {"name": "mha", "n_heads": 3}},
    "gqa": {"attention": {"name": "gqa", "n_heads": 6, "n_kv_heads": 2}},
    "mla": {"attention": {"name": "mla", "n_heads": 3}},
    "window": {"attention": {"name": "sliding_window", "n_heads": 3, "n_kv_heads": 3, "window": 7}},
    "kda": {"attention": KDA},
    "hybrid": HYBRID,
}
CONTEXT = 37


def build(name: str, dtype: torch.dtype = torch.float32) -> Decoder:
    plain = {"variants": None, "layout": None, "gating": None, "experts": None}
    sizes = {"vocab_size": 61, "d_model": 24, "n_layers": 2, "ffn": {"name": "swiglu", "d_ff": 20}}
    return compose(preset("tiny", {**plain, **sizes, **MODELS[name]})).to(dtype).eval()


def batch(name: str, bits: Bits, memory: str = "100kB", rows: int | None = None, **more: Any) -> FullBatch:
    return FullBatch(build(name, **more), Cell(name, bits, CONTEXT), Settings(memory, rows=rows, steps=5))


@pytest.mark.parametrize(("name", "bits"), each(list(MODELS), [None, 8, 6, 4]))
def test_as_many_rows_as_fit_and_no_more(name: str, bits: Bits) -> None:
    full = batch(name, bits)
    seconds, held = full.turn()
    assert full.rows * full.row_bytes <= 100_000 < (full.rows + 1) * full.row_bytes
    assert held == full.rows * full.row_bytes
    assert seconds.processor > 0 and seconds.wall > 0


def test_rows_are_limited_by_what_is_chosen_too() -> None:
    assert batch("gqa", None, rows=3).rows == 3
    assert batch("gqa", None, rows=10_000).rows == batch("gqa", None).rows


def test_bytes_are_those_of_the_memory_behind_views() -> None:
    caches = build("gqa").new_caches(3, CONTEXT)
    assert allocated(caches) == sum(buffer.nbytes for cache in caches for buffer in cache.buffers.values()) > 0
    whole, other = torch.zeros(4, 5), torch.zeros(7)
    views: Any = SimpleNamespace(buffers={"first": whole[:1], "last": whole[3:], "other": other[2:3]})
    assert allocated([views, views]) == whole.nbytes + other.nbytes


@pytest.mark.parametrize(("name", "bits", "dtype"), pairs(list(MODELS), [None, 6], [torch.float32, torch.bfloat16]))
@torch.inference_mode()
def test_every_row_decodes_what_it_would_alone(name: str, bits: Bits, dtype: torch.dtype) -> None:
    off = 1e-5 if dtype == torch.float32 else 3e-2
    full = batch(name, bits, rows=3, dtype=dtype)
    prompt = FullBatch._tokens(_again(full), 1, CONTEXT - 6)
    tokens = torch.tensor([[5], [11], [60]])
    together = prefill(full.decoder, tokens, full.caches())
    for row, token in enumerate(tokens):
        alone = full.decoder.new_caches(1, CONTEXT, bits)
        prefill(full.decoder, prompt, alone)
        expected = prefill(full.decoder, token[None], alone)
        torch.testing.assert_close(together[row : row + 1], expected, rtol=off, atol=off)


def _again(full: FullBatch) -> FullBatch:
    """The same batch, before it has drawn anything."""
    full.draws.manual_seed(0)
    return full


def test_steps_are_those_of_greedy_decoding() -> None:
    full = batch("hybrid", None, rows=1)
    prompt = _again(full)._tokens(1, CONTEXT - 6)[0].tolist()
    greedy = Continuations(full.decoder, [prompt], 6, Sampling(temperature=0))
    expected = [tokens[0] for tokens in greedy]
    with torch.inference_mode():
        caches, token = full.caches(), torch.tensor([[expected[0]]])
        for later in expected[1:]:
            token = full._step(token, caches)
            assert token.item() == later


def test_a_turn_fills_its_caches_and_leaves_the_prompt_as_it_was() -> None:
    full = batch("mla", None, rows=2)
    before = [{name: held.clone() for name, held in cache.buffers.items()} for cache in full._one]
    lengths: list[int] = []
    step = full._step
    full._step = lambda tokens, caches: (step(tokens, caches), lengths.append(caches[0].length))[0]  # type: ignore[method-assign]
    full.turn()
    full.turn()
    assert lengths == [*range(CONTEXT - 5, CONTEXT + 1)] * 2
    for cache, old in zip(full._one, before, strict=True):
        for name, held in cache.buffers.items():
            assert torch.equal(held, old[name])


def test_seconds_are_those_of_one_step() -> None:
    full = batch("gqa", None, rows=1)

    def busy(tokens: torch.Tensor, caches: object) -> torch.Tensor:
        end = time.process_time() + 0.01
        while time.process_time() < end:
            pass
        return tokens

    full._step = busy  # type: ignore[method-assign]
    assert full.turn()[0].processor == pytest.approx(0.01, rel=0.5)
