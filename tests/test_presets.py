"""The published models of conf/model/: their structure, and every variant as a choice. Sizes: lab/test_describe.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import registry
from blocks.compose import check, compose
from blocks.decoder import Decoder
from registry import Node
from training.composition import CONF, compose_config

MODELS = sorted(p.stem for p in (CONF / "model").glob("*.yaml") if p.stem not in ("base", "file", "pretrained"))
VARIANTS = sorted((p.parent.name, p.stem) for p in (CONF / "model").glob("*/*.yaml"))


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
