"""The published models of conf/model/: their sizes to the last parameter, and every variant as a choice."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import registry
from blocks.compose import check, compose
from blocks.cost import count_parameters
from blocks.decoder import Decoder
from registry import Node
from training.composition import CONF, compose_config

MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml") if p.stem != "base")
VARIANTS = sorted((p.parent.name, p.stem) for p in (CONF / "model").glob("*/*.yaml"))
# total, active, active without the embedding: counted on transformers' models and by closed forms
SIZES = {
    "deepseek_v2": (235_741_434_880, 21_375_800_320, 20_851_512_320),
    "deepseek_v2_lite": (15_706_484_224, 2_661_150_208, 2_451_435_008),
    "deepseek_67b": (67_425_001_472, 67_425_001_472, 66_586_140_672),
    "llama2_7b": (6_738_415_616, 6_738_415_616, 6_607_343_616),
    "gpt2": (124_439_808, 124_439_808, 124_439_808 - 38_597_376),
}
KV_NUMBERS = {
    "deepseek_v2": 34_560,
    "deepseek_v2_lite": 15_552,
    "deepseek_67b": 194_560,
    "llama2_7b": 262_144,
    "gpt2": 2 * 12 * 768,
}


@pytest.fixture(scope="module")
def preset() -> Callable[..., Decoder]:
    built: dict[tuple[str, ...], Decoder] = {}

    def build(*overrides: str) -> Decoder:
        if overrides not in built:
            built[overrides] = compose(compose_config(overrides).model, device="meta")
        return built[overrides]

    return build


@pytest.mark.parametrize("model", MODELS)
def test_preset_composes_within_seconds_and_runs(preset: Callable[..., Decoder], model: str) -> None:
    start = time.perf_counter()
    decoder = preset(f"model={model}")
    assert time.perf_counter() - start < 10
    logits = decoder(torch.zeros(1, 3, dtype=torch.long, device="meta"))
    assert logits.shape == (1, 3, decoder.config["vocab_size"])


@pytest.mark.parametrize("model", SIZES)
def test_preset_has_the_published_parameters_to_the_last(preset: Callable[..., Decoder], model: str) -> None:
    counted = count_parameters(preset(f"model={model}"))
    assert (counted.total, counted.active, counted.active - counted.embedding) == SIZES[model]


@pytest.mark.parametrize("model", KV_NUMBERS)
def test_preset_remembers_as_many_numbers_a_token_as_published(preset: Callable[..., Decoder], model: str) -> None:
    caches = preset(f"model={model}").to(torch.bfloat16).new_caches(1, 1)
    assert sum(c.nbytes for c in caches) == 2 * KV_NUMBERS[model]


def test_small_mla_ablation_has_the_published_sizes(preset: Callable[..., Decoder]) -> None:
    """V2-Lite with 16 heads of MHA in place of MLA: the other column of the report's table."""
    overrides = ("model=deepseek_v2_lite", "model/attention=mha", "model.attention.n_heads=16", "model/position=rope")
    mha = preset(*overrides)
    counted = count_parameters(mha)
    assert (counted.total, counted.active - counted.embedding) == (15_787_866_112, 2_532_816_896)
    assert sum(c.nbytes for c in mha.to(torch.bfloat16).new_caches(1, 1)) == 2 * 110_592


def test_v2_lite_has_one_dense_layer_and_yarn_everywhere(preset: Callable[..., Decoder]) -> None:
    layers = preset("model=deepseek_v2_lite").layers
    assert [type(layer.ffn).__name__ for layer in layers] == ["SwiGLU"] + ["MoE"] * 26
    assert [layer.attention.scale for layer in layers] == [pytest.approx(0.1147213868)] * 27
    gate = layers[1].ffn.gating
    assert (gate.top_k, gate.renormalise, gate.scaling, gate.balance[0].alpha) == (6, False, 1.0, 0.001)


def test_v2_routes_as_published(preset: Callable[..., Decoder]) -> None:
    gate = preset("model=deepseek_v2").layers[-1].ffn.gating
    assert (gate.top_k, gate.n_groups, gate.top_groups, gate.scaling, gate.balance[0].alpha) == (6, 8, 3, 16.0, 0.003)


# --- the files --------------------------------------------------------------------------------------------------------


def test_no_file_bears_a_registered_blocks_name() -> None:
    """It would shadow the typed option, and with it the block's schema."""
    assert not [(kind, name) for kind, name in VARIANTS if name in registry.names(kind)]


def test_every_folder_of_variants_is_a_kind() -> None:
    assert {kind for kind, _ in VARIANTS} <= set(registry.kinds())


@pytest.mark.parametrize(("kind", "name"), VARIANTS, ids=lambda v: v)
def test_variant_inherits_a_registered_block_and_keeps_its_schema(kind: str, name: str) -> None:
    selected = kind in compose_config(["model=tiny"]).model
    node = compose_config(["model=tiny", f"{'' if selected else '+'}model/{kind}={name}"]).model[kind]
    plain = OmegaConf.to_container(node, resolve=True)
    entry, given = registry.resolve(kind, Node(plain, f"model.{kind}"))
    assert entry.name == plain["name"] and plain["name"] != name
    written = OmegaConf.load(CONF / "model" / kind / f"{name}.yaml")
    for key, value in written.items():
        if key != "defaults":
            assert given[key] == (OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


@pytest.mark.parametrize("path", sorted((CONF / "model").rglob("*.yaml")), ids=lambda p: p.stem)
def test_leaf_is_about_a_dozen_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 18


@pytest.mark.parametrize("model", MODELS)
def test_body_of_a_preset_holds_no_blocks_own_keys(model: str) -> None:
    """Else swapping that block breaks the preset."""
    written = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{model}.yaml"))
    assert not set(written) & set(registry.kinds())


@pytest.mark.parametrize("attention", registry.names("attention"))
@pytest.mark.parametrize("position", registry.names("position"))
def test_every_attention_and_position_can_be_swapped_into_the_small_preset(attention: str, position: str) -> None:
    check(compose_config(["model=tiny", f"model/attention={attention}", f"model/position={position}"]).model)


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k in ("gating", "norm", "residual", "ffn") for n in registry.names(k)]
)
def test_every_other_block_can_be_swapped_into_the_small_preset(kind: str, name: str) -> None:
    check(compose_config(["model=tiny", f"model/{kind}={name}"]).model)


@pytest.mark.parametrize("path", sorted((CONF / "experiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_model_of_every_experiment_is_valid(path: Path) -> None:
    check(compose_config([f"experiment={path.stem}"]).model)
