"""What a node generates: caches at the width asked for, states of recurrent mixers at their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import cache_bytes
from blockwright.blocks.kernels.quantise import BITS
from blockwright.plugins.planner.generation import Generation, bytes_of_one, generation
from blockwright.plugins.planner.hardware import coefficients, hardware
from blockwright.registry import ConfigError

KIMI: dict[str, Any] = {"n_layers": 4, "layout": {"attention": "linear*3 attention"}}


@pytest.mark.parametrize("name", ["kimi_linear_48b_a3b", "llama3_1_8b"])
def test_caches_take_the_bytes_that_they_take(name: str) -> None:
    decoder = compose(preset(name, KIMI if name.startswith("kimi") else {"n_layers": 4}), device="meta")
    found = generation(decoder, hardware("h800"), coefficients(), context=512)
    assert found.caches / found.batch == cache_bytes(decoder, 512, torch.bfloat16)


@pytest.mark.parametrize("bits", BITS[-1:])
def test_quantised_caches_have_scales(bits: int) -> None:
    """As many sequences fit as caches are made of."""
    decoder = compose(preset("tiny", {"vocab_size": 256}), device="meta")
    found = generation(decoder, hardware("h800"), coefficients(), gpus=1, context=512, cache_bits=bits)
    made = sum(cache.nbytes for cache in decoder.new_caches(1, 512, bits))
    assert found.caches / found.batch == made


def test_bits_that_an_attention_does_not_take_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = compose(preset("tiny", {"vocab_size": 256}), device="meta")

    def exact_only(batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        return Cache(batch, length, {"k": (8,)}, dtype, device)

    monkeypatch.setattr(type(decoder.layers[0].attention), "new_cache", staticmethod(exact_only))
    with pytest.raises(ConfigError, match="exact caches only") as refused:
        generation(decoder, hardware("h800"), coefficients(), gpus=1, context=512, cache_bits=6)
    assert refused.value.path == "cache.bits"


@pytest.mark.slow
def test_states_do_not_shrink_with_the_numbers_of_caches() -> None:
    decoder = compose(preset("kimi_linear_48b_a3b", KIMI), device="meta")
    whole, quarter = (
        generation(decoder, hardware("h800"), coefficients(), context=512, cache_bits=bits) for bits in (16, 4)
    )
    grown = cache_bytes(decoder, 512, torch.bfloat16) - cache_bytes(decoder, 256, torch.bfloat16)
    shrunk = whole.caches / whole.batch - quarter.caches / quarter.batch
    assert grown > 0 and shrunk == pytest.approx(2 * grown * 12 / 16, rel=0.05)


@pytest.mark.parametrize(("name", "bits"), [("kimi_linear_48b_a3b", 6), ("deepseek_v2_lite", 4), ("llama3_1_8b", 8)])
def test_quantised_caches_are_counted_with_their_scales(name: str, bits: int) -> None:
    decoder = compose(preset(name, KIMI if name.startswith("kimi") else {"n_layers": 4}), device="meta")
    planned = bytes_of_one(decoder, 512, weight_bits=16, cache_bits=bits)
    assert planned == sum(cache.nbytes for cache in decoder.to(torch.bfloat16).new_caches(1, 512, bits))
    assert planned > bytes_of_one(decoder, 512, weight_bits=16, cache_bits=bits + 1e-9)  # whose numbers have none


@pytest.mark.parametrize("width", [32])
def test_exact_caches_are_those_of_their_dtype(width: int) -> None:
    decoder = compose(preset("kimi_linear_48b_a3b", KIMI), device="meta").to(
        {16: torch.bfloat16, 32: torch.float32}[width]
    )
    planned = bytes_of_one(decoder, 512, weight_bits=width, cache_bits=width)
    assert planned == sum(cache.nbytes for cache in decoder.new_caches(1, 512))


def test_a_batch_that_is_chosen_is_the_one_that_is_planned() -> None:
    decoder = compose(preset("deepseek_v2_lite", {"n_layers": 4}), device="meta")
    full, single = (generation(decoder, hardware("h800"), coefficients(), batch=batch) for batch in (None, 1))
    assert full.batch > single.batch == 1 and single.caches == full.caches / full.batch
    assert single.seconds < full.seconds and single.tokens_per_second < full.tokens_per_second


def test_a_step_takes_no_less_than_the_roofline() -> None:
    step = Generation(8, 1.0, 1.0, {"reads": 3.0, "computes": 1.0}, {"reads": 1.0, "computes": 2.0})
    assert step.least_seconds == 4.0 and step.seconds == 5.0
