"""A composition is measured as closed forms count it, and what a node generates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import cache_bytes, forward_flops_per_token
from blockwright.plugins.planner.generation import Generation, bytes_of_one, generation
from blockwright.plugins.planner.hardware import coefficients, hardware
from blockwright.plugins.planner.measure import count_places, measure
from blockwright.registry import ConfigError, register


def measured(config: dict[str, Any]) -> Any:
    return measure(compose(config, device="meta"))


def test_dense_products_are_two_flops_a_weight_and_scores_four_a_head_width(tiny: Callable[..., Any]) -> None:
    found = measured(tiny(attention={"name": "gqa", "n_heads": 4, "n_kv_heads": 2}, n_layers=3))
    decoder = found.decoder
    matrices = sum(p.numel() for p in decoder.parameters() if p.ndim == 2) - decoder.embedding.weight.numel()
    assert found.whole.dense == pytest.approx(2 * matrices)
    assert found.whole.routed == 0 and found.n_experts == 0
    assert [s.flops for s in found.scores] == pytest.approx([3 * 4 * 48])  # q kᵀ and the weighted sum, all heads
    assert found.scores_at(32) == pytest.approx(3 * 4 * 48 * 16)  # half of the square is hidden
    assert found.training_flops(32) == pytest.approx(3 * (2 * matrices + 3 * 4 * 48 * 16))


RECURRENT = pytest.param("tiny", {"attention": "kda", "vocab_size": 64}, marks=pytest.mark.slow)  # in parts


@pytest.mark.parametrize(("name", "changes"), [("gpt2", {}), ("qwen3_30b_a3b", {}), RECURRENT])
def test_flops_are_those_of_the_cost_card(name: str, changes: dict[str, Any]) -> None:
    decoder = compose(preset(name, {"n_layers": 2, **changes}), device="meta")
    found = measure(decoder)
    counted = found.whole.dense + found.whole.routed + 512 * sum(s.flops for s in found.scores)
    assert counted == pytest.approx(forward_flops_per_token(decoder, 512))


def test_mlas_scores_have_two_widths_and_its_memory_is_the_latent() -> None:
    found = measured(preset("deepseek_v2_lite", {"n_layers": 3}))
    assert sum(s.flops for s in found.scores) == pytest.approx(3 * 2 * 16 * (128 + 64 + 128))
    assert (found.cached, found.kv_heads, found.n_routed, found.visits) == (3 * 576, 1, 2, 6)
    assert found.expert_width == 1408
    assert found.whole.routed == pytest.approx(2 * 6 * 2 * 3 * 2048 * 1408)


def test_a_window_hides_scores_and_is_read_off_the_cache() -> None:
    found = measured(preset("gpt_oss_20b", {"n_layers": 2}))
    windows = sorted(s.window for s in found.scores)
    assert windows == [128, float("inf")]
    by_window = {s.window: s for s in found.scores}
    seen = sum(min(t, 128) for t in range(4096)) / 4096
    assert by_window[128].seen(4096) == pytest.approx(by_window[128].flops * seen, rel=1e-2)


@pytest.mark.slow
def test_multi_token_prediction_computes_a_layer_its_projection_and_the_head_again(tiny: Callable[..., Any]) -> None:
    alone, longer = (measured(tiny(moe=True, n_layers=n)) for n in (4, 5))
    further = measured(tiny(moe=True, n_layers=4, mtp={"depth": 1}))
    layer, extra = longer.whole.dense - alone.whole.dense, further.whole.dense - alone.whole.dense
    assert extra == pytest.approx(layer + 2 * (2 * 48 * 48 + 48 * 61))
    assert (further.n_layers, further.n_routed) == (5, longer.n_routed)


@pytest.mark.usefixtures("temporary_blocks")
def test_a_plug_ins_attention_is_measured_like_any_other(tiny: Callable[..., Any]) -> None:
    @register("attention", "mixing")
    class Mixing(Attention):
        def __init__(self, d_model: int) -> None:
            super().__init__()
            self.mix = nn.Linear(d_model, 3 * d_model, bias=False)

        def forward(self, x: Any, positions: Any, *, segments: Any = None, cache: Any = None) -> Any:
            return self.mix(x)[..., : x.shape[-1]]

    found = measured(tiny(attention="mixing"))
    assert found.parts["attention"].dense == pytest.approx(2 * 2 * 3 * 48 * 48)
    assert found.scores_at(4096) == 0 and found.cached == 0
    kept = found.parts["attention"].kept  # x, in bfloat16, in both layers
    assert kept == pytest.approx(2 * 2 * 48)


def test_group_limited_gates_reach_no_more_places_than_groups() -> None:
    decoder = compose(preset("deepseek_v2", {"n_layers": 2}), device="meta")
    gate = decoder.layers[1].ffn.gating
    free = compose(preset("deepseek_v2", {"n_layers": 2, "gating": "softmax_topk", "max_positions": 8}), device="meta")
    other = free.layers[1].ffn.gating
    assert count_places(gate, 1) == 1 and count_places(gate, 160) == 6
    assert 2 < count_places(gate, 8) <= 3  # three groups of eight
    assert count_places(other, 8) == pytest.approx(8 * (1 - (1 - 1 / 8) ** other.top_k), rel=0.1)


def test_the_decoder_itself_is_left_as_it_was(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny(moe=True), device="meta")
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder.modules()]
    measure(decoder)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder.modules()] == before
    assert all(p.dtype == torch.float32 for p in decoder.parameters())


def test_layers_read_all_streams_and_the_first_one_opens_them(tiny: Callable[..., Any]) -> None:
    residual = {"name": "attention_residual", "block": 2}
    found = measured(tiny(residual=residual, n_layers=4, mtp={"depth": 1, "loss_weight": 0.3}))
    assert found.inputs == (1 + 2 + 3 + 4 + 1) * 48


KIMI: dict[str, Any] = {"n_layers": 4, "layout": {"attention": "linear*3 attention"}}


@pytest.mark.parametrize("name", ["kimi_linear_48b_a3b", "llama3_1_8b"])
def test_caches_take_the_bytes_that_they_take(name: str) -> None:
    decoder = compose(preset(name, KIMI if name.startswith("kimi") else {"n_layers": 4}), device="meta")
    found = generation(decoder, hardware("h800"), coefficients(), context=512)
    assert found.caches / found.batch == cache_bytes(decoder, 512, torch.bfloat16)


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


def test_exact_caches_are_those_of_their_dtype() -> None:
    decoder = compose(preset("kimi_linear_48b_a3b", KIMI), device="meta")
    planned = bytes_of_one(decoder, 512, weight_bits=32, cache_bits=32)
    assert planned == sum(cache.nbytes for cache in decoder.new_caches(1, 512))


def test_a_batch_that_is_chosen_is_the_one_that_is_planned() -> None:
    decoder = compose(preset("deepseek_v2_lite", {"n_layers": 2}), device="meta")
    full, single = (generation(decoder, hardware("h800"), coefficients(), batch=batch) for batch in (None, 1))
    assert full.batch > single.batch == 1 and single.caches == full.caches / full.batch
    assert single.seconds < full.seconds and single.tokens_per_second < full.tokens_per_second


def test_a_step_takes_no_less_than_the_roofline() -> None:
    step = Generation(8, 1.0, 1.0, {"reads": 3.0, "computes": 1.0}, {"reads": 1.0, "computes": 2.0})
    assert step.least_seconds == 4.0 and step.seconds == 5.0
