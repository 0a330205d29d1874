"""Rules of width: factors from shapes at two sizes, and that the run, its record and its optimizer have them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from blockwright.blocks.compose import compose, preset
from blockwright.registry import ConfigError
from blockwright.training.optimizers.adamw import AdamW
from blockwright.training.optimizers.matrices import Muon
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parametrisations import Width, WidthDepth

MHA = {"name": "mha", "n_heads": 16}
DENSE = {"vocab_size": 96, "attention": MHA, "ffn": {"name": "swiglu", "d_ff": 1024}, "layout": {}, "variants": {}}
BASE = {"d_model": 64, "attention": {"n_heads": 4}, "ffn": {"d_ff": 256}}
M = 4  # growth


def dense(**changes: Any) -> dict[str, Any]:
    plain = {key: value for key, value in preset("tiny").items() if key not in ("layout", "variants")}
    model = {**plain, **DENSE, "d_model": 256, "n_layers": 2, **changes}
    return compose(model, device="meta").config


def mixture(d_model: int, n_heads: int, d_ff: int) -> dict[str, Any]:
    attention = {"name": "mla", "n_heads": n_heads, "kv_lora_rank": d_model, "qk_nope_head_dim": 16}
    attention |= {"qk_rope_head_dim": 8, "v_head_dim": 16}
    return {"d_model": d_model, "attention": attention, "experts": {"name": "swiglu", "d_ff": d_ff}}


def factors(parametrisation: Width, recipe: OptimizerRecipe | None = None) -> dict[str, tuple[float, float]]:
    """Name → (init, rate)."""
    found = parametrisation.scales(recipe or AdamW())
    return {name.replace("layers.1.", ""): (s.init, s.rate) for name, s in found.items()}


def test_matrices_get_1_over_width_of_adam_and_start_at_its_root() -> None:
    found = factors(Width(BASE, dense(scale_embeddings=False)))
    assert found["attention.query.weight"] == pytest.approx((M**-0.5, 1 / M))
    assert found["ffn.down.weight"] == pytest.approx((M**-0.5, 1 / M))
    assert found["head.weight"] == pytest.approx((1 / M, 1 / M))
    assert found["embedding.weight"] == (1, 1)
    assert found["norm.weight"] == (1, 1)


def test_steps_of_muon_are_scaled_by_their_spectral_norm() -> None:
    for recipe, rate in ((Muon(), M**-0.5), (Muon(adjust_lr_fn="original", adamw_lr=1e-3), 1.0)):
        found = factors(Width(BASE, dense()), recipe)
        assert found["attention.query.weight"] == pytest.approx((M**-0.5, rate))
        assert found["head.weight"] == pytest.approx((1 / M, 1 / M))  # AdamW's


def test_a_scaled_embedding_starts_and_moves_by_the_root() -> None:
    assert factors(Width(BASE, dense()))["embedding.weight"] == pytest.approx((M**-0.5, M**-0.5))


def test_the_gain_before_a_tied_head_takes_the_factor_of_the_head() -> None:
    found = factors(Width(BASE, dense(tie_embeddings=True, scale_embeddings=False)))
    assert found["embedding.weight"] == (1, 1)
    assert found["norm.weight"] == pytest.approx((1 / M, 1 / M))
    scaled = factors(Width(BASE, dense(tie_embeddings=True)))
    assert scaled["norm.weight"] == pytest.approx((M**-0.5, M**-0.5))


def test_a_tied_head_without_a_gain_before_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="tied"):
        Width(BASE, dense(tie_embeddings=True, norm="unit_rms")).scales(AdamW())


def test_queries_of_wider_heads_take_what_their_attention_lacks() -> None:
    wider = {"d_model": 64, "ffn": {"d_ff": 256}}
    found = factors(Width(wider, dense()))
    assert found["attention.query.weight"] == pytest.approx((M**-0.5 / M**0.5, 1 / M / M**0.5))
    assert found["attention.key.weight"] == pytest.approx((M**-0.5, 1 / M))


def test_latents_and_stacks_of_experts_are_scaled_by_their_own_sides() -> None:
    model = compose(preset("tiny", {"vocab_size": 96, "n_layers": 2, **mixture(256, 16, 128)}), device="meta").config
    base = mixture(64, 4, 32)
    del base["attention"]["name"], base["experts"]["name"]
    found = factors(Width(base, model), Muon())
    rows = (256 + 8) / (64 + 8)  # the rotated rows of a latent stay
    latent = math.sqrt(rows / M) * math.sqrt(72 / 264)
    assert found["attention.kv_down.weight"][1] == pytest.approx(latent)
    assert found["attention.kv_down.weight"][0] == pytest.approx(math.sqrt(rows / M) / M**0.5)
    assert found["ffn.experts.gate_up"] == pytest.approx((M**-0.5, M**-0.5))
    assert found["ffn.gating.weight"] == pytest.approx((1 / M, 1 / M))  # AdamW's; the number of experts stays
    assert "ffn.gating.weight out" in " ".join(Width(base, model).notes())


def test_at_the_size_of_the_base_nothing_is_scaled() -> None:
    model = dense()
    same = {"d_model": 256}
    assert set(Width(same, model).scales(AdamW()).values()) == {(1.0, 1.0, 1.0)}
    scales = Width(same, model).scales(AdamW())
    ours, theirs = compose(model, scales=scales), compose(model)
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_initial_values_are_the_same_draws_times_the_factor() -> None:
    model = dense()
    scales = Width(BASE, model).scales(AdamW())
    ours, theirs = (dict(compose(model, scales=s).named_parameters()) for s in (scales, {}))
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name] * scales[name].init)


def test_an_optimizer_keeps_decay_times_rate_and_lowers_epsilon() -> None:
    model = dense()
    recipe = AdamW(lr=0.1, weight_decay=0.3, eps=1e-6, multipliers={"attention": 0.5})
    decoder = compose(model, device="meta")
    groups = recipe.scaled(Width(BASE, model).scales(recipe)).build(decoder).param_groups
    by_name = {n: g for g in groups for n, p in decoder.named_parameters() for q in g["params"] if p is q}
    query = by_name["layers.0.attention.query.weight"]
    assert query["lr"] == pytest.approx(0.1 * 0.5 / M)
    assert query["lr"] * query["weight_decay"] == pytest.approx(0.1 * 0.5 * 0.3)
    assert query["eps"] == pytest.approx(1e-6 / M)
    assert by_name["head.weight"]["eps"] == pytest.approx(1e-6)
    held = [p for g in groups for p in g["params"]]
    assert len(held) == len(set(held)) == len(list(decoder.parameters()))
    assert len({g["name"] for g in groups}) == len(groups)


def test_depth_divides_what_is_added_to_the_stream_alone() -> None:
    model = dense(n_layers=6)
    base = {**BASE, "n_layers": 2}
    widths = Width(BASE, model).scales(AdamW())
    both = WidthDepth(base, model).scales(AdamW())
    for name, scale in both.items():
        output = name.startswith("layers.") and name.endswith(("attention.output.weight", "ffn.down.weight"))
        assert scale.init / widths[name].init == pytest.approx(1 / 3 if output else 1), name
        assert scale.rate / widths[name].rate == pytest.approx(1 / 3 if output else 1), name
        inside = name.startswith("layers.") and not output
        assert scale.eps / widths[name].eps == pytest.approx(1 / 3 if inside else 1), name


def test_depths_factors_are_a_division_of_the_branches() -> None:
    """Values and steps of the outputs divided by m_L train as branches that are divided by it."""
    recipe = Muon(lr=0.01, weight_decay=0.0)
    model = dense(d_model=32, attention={"name": "mha", "n_heads": 2}, ffn={"name": "swiglu", "d_ff": 48}, n_layers=4)
    scales = WidthDepth({"n_layers": 2}, model).scales(recipe)
    ours, theirs = compose(model, scales=scales).double(), compose(model).double()
    for layer in theirs.layers:
        for part in (layer.attention.output, layer.ffn.down):
            part.register_forward_hook(lambda _module, _given, y: y / 2)
    tokens = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
    for decoder, chosen in ((ours, recipe.scaled(scales)), (theirs, recipe)):
        optimizer = chosen.build(decoder)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=0.0, atol=2e-4)


@pytest.mark.parametrize("residual", ["sandwich", "postnorm"])
def test_branches_that_no_weight_scales_are_refused(residual: str) -> None:
    with pytest.raises(ConfigError, match="no weight scales it"):
        WidthDepth({"n_layers": 1}, dense(residual=residual)).scales(AdamW())


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ({}, "parametrisation.base"),
        ({"d_modl": 64}, "parametrisation.base.d_modl"),
        ({"attention": "kda"}, "parametrisation.base"),
        ({"d_model": 64, "n_layers": 1}, "parametrisation.base.n_layers"),
        ({"d_model": 60}, "parametrisation.base.attention.n_heads"),
    ],
)
def test_a_wrong_base_is_refused_where_it_is_written(base: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Width(base, dense(attention={"name": "gqa", "n_heads": 16, "n_kv_heads": 4})).scales(AdamW())
    assert refused.value.path == path
    assert refused.value.remedy


def test_a_recipe_that_does_not_say_how_large_its_steps_are_is_refused() -> None:
    class Plain(OptimizerRecipe):
        def build(self, module: torch.nn.Module) -> torch.optim.Optimizer:
            return torch.optim.SGD(module.parameters(), lr=0.1)

    with pytest.raises(ConfigError, match="how large its steps are"):
        Width(BASE, dense()).scales(Plain())
