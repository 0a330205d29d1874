"""A composition is measured as closed forms count it, blocks of plug-ins included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.compose import compose, preset
from blockwright.blocks.cost import forward_flops_per_token
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.routing import count_places
from blockwright.registry import register


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


@pytest.mark.parametrize("name", ["gpt2", "qwen3_30b_a3b"])
def test_flops_are_those_of_the_cost_card(name: str) -> None:
    decoder = compose(preset(name, {"n_layers": 2}), device="meta")
    found = measure(decoder)
    card = forward_flops_per_token(decoder, 100)
    assert found.whole.dense + found.whole.routed + 100 * sum(s.flops for s in found.scores) == pytest.approx(card)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["kda", "short_conv"])
def test_flops_of_a_recurrent_mixer_are_those_of_the_cost_card(mixer: str) -> None:
    decoder = compose(
        preset("tiny", {"n_layers": 2, "attention": mixer, "vocab_size": 64}), device="meta"
    )  # in parts: more products
    measured = measure(decoder)
    scores = sum(s.flops for s in measured.scores) * 512
    assert measured.whole.dense + measured.whole.routed + scores == pytest.approx(forward_flops_per_token(decoder, 512))


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
    k = other.top_k
    expected = 8 * (1 - (1 - 1 / 8) ** k)
    assert count_places(other, 8) == pytest.approx(expected, rel=0.1)


def test_the_decoder_itself_is_left_as_it_was(tiny: Callable[..., Any]) -> None:
    decoder = compose(tiny(moe=True), device="meta")
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder.modules()]
    measure(decoder)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in decoder.modules()] == before
    assert all(p.dtype == torch.float32 for p in decoder.parameters())


@pytest.mark.parametrize(
    ("residual", "streams"),
    [({"name": "attention_residual", "block": 2}, 1 + 2 + 3 + 4)],
)
def test_layers_read_all_streams_and_the_first_one_opens_them(
    tiny: Callable[..., Any], residual: Any, streams: int
) -> None:
    found = measured(tiny(residual=residual, n_layers=4, mtp={"depth": 1, "loss_weight": 0.3}))
    assert found.inputs == (streams + 1) * 48
