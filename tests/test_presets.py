"""The published models of conf/preset/: their structure, and what one may swap in them. Sizes: lab/test_describe.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from shrinking import shrunken

from blockwright import registry
from blockwright.blocks.compose import check, compose, preset
from blockwright.blocks.initialise import initialise
from blockwright.blocks.sample import alike
from blockwright.lab.match.request import swept
from blockwright.registry import ConfigError, Node, presets
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.conf import CONF

BYTES = 257  # vocabulary of the tokenizer that tiny is trained with: its preset leaves that to the tokenizer
FILES = sorted(presets.BUILTIN.glob("*.yaml"))


NAMED = [pytest.param(file.stem, marks=[] if i % 12 == 0 else pytest.mark.slow) for i, file in enumerate(FILES)]


@pytest.mark.parametrize("name", NAMED)
def test_preset_composes_and_runs(name: str) -> None:
    built = compose({"vocab_size": BYTES, **preset(name)}, device="meta")
    one_of_each = built.with_layers(built.layers[group[0]] for group in alike(built.layers))
    logits = one_of_each(torch.zeros(1, 3, dtype=torch.long, device="meta"))
    assert logits.shape == (1, 3, built.config["vocab_size"])


def test_deepseek_v2_routes_and_scales_as_published() -> None:
    layers = compose(preset("deepseek_v2_lite"), device="meta").layers
    assert [type(layer.ffn).__name__ for layer in layers] == ["SwiGLU"] + ["MoE"] * 26
    assert [layer.attention.scale for layer in layers] == [pytest.approx(0.1147213868)] * 27
    gate = layers[1].ffn.gating
    assert (gate.top_k, gate.renormalise, gate.scaling, gate.balance[0].alpha) == (6, False, 1.0, 0.001)
    gate = compose(preset("deepseek_v2"), device="meta").layers[-1].ffn.gating
    assert (gate.top_k, gate.n_groups, gate.top_groups, gate.scaling, gate.balance[0].alpha) == (6, 8, 3, 16.0, 0.003)


def test_conf_holds_no_variant_of_a_block_and_a_model_is_a_screenful_that_says_what_it_is() -> None:
    held = {p.relative_to(CONF / "model").as_posix() for p in (CONF / "model").rglob("*.yaml")}
    assert held == {f"{name}.yaml" for name in presets.RESERVED}
    assert not [path for path in FILES if len(path.read_text().splitlines()) > 19]  # one of them names its schema
    assert not [path for path in FILES if len(presets.find(path.stem).summary) <= 20]


@pytest.mark.parametrize("path", FILES[::12], ids=lambda p: p.stem)
def test_text_of_a_preset_is_what_compose_takes(path: Path) -> None:
    text = path.read_text()
    text += "" if "vocab_size" in preset(path.stem) else f"\nvocab_size: {BYTES}\n"
    assert check(text) == check({"vocab_size": BYTES, **preset(path.stem)})


def test_swap_on_the_command_line_leaves_nothing_of_the_presets_own_block() -> None:
    model = compose_config(["model=deepseek_v2_lite", "model/attention=gqa"]).model
    entry = registry.lookup("attention", "gqa")
    assert set(model.attention) == {"name", *entry.schema.parameters}
    assert check(model)["attention"]["n_heads"] == entry.schema.parameters["n_heads"].default
    assert model.position.name == "yarn" and model.gating.top_k == 6  # the others stay
    model = compose_config(["model=deepseek_v2_lite", "model.attention.n_heads=4"]).model
    assert (model.attention.name, model.attention.n_heads, model.attention.kv_lora_rank) == ("mla", 4, 512)


def test_block_of_another_preset_can_be_borrowed_and_changed() -> None:
    borrowed = ["model/attention=of/deepseek_v2_lite", "model.attention.n_heads=4"]
    model = compose_config(["model=llama3_1_8b", *borrowed]).model
    expected = registry.resolve("attention", Node(preset("deepseek_v2_lite")["attention"], "model.attention"))[1]
    assert OmegaConf.to_container(model.attention) == {"name": "mla", **expected, "n_heads": 4}
    assert model.d_model == 4096 and model.position.name == "rope_llama3"


@pytest.mark.parametrize("override", ["model/attention=of/deepsek_v2", "+model/qk_norm=of/tiny"])
def test_block_of_a_preset_that_has_none_is_refused(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(["model=deepseek_v2_lite", override])
    assert caught.value.path == override.lstrip("+").partition("=")[0] and caught.value.remedy


def test_sweep_over_every_option_of_a_kind_means_the_registered_blocks() -> None:
    for kind in ("attention", "gating"):
        assert list(swept([f"model/{kind}=glob(*)"])) == registry.names(kind)


@pytest.mark.parametrize("name", NAMED)
def test_no_weight_is_left_as_the_memory_was(name: str) -> None:
    """Built on the meta device and materialised, as on a GPU: memory that holds NaN, initialised, holds none."""
    decoder = compose(shrunken(name), device="meta").to_empty(device="cpu")
    for tensor in (*decoder.parameters(), *decoder.buffers()):
        if tensor.is_floating_point():
            tensor.detach().fill_(torch.nan)
    initialise(decoder, **decoder.config["init"], n_layers=decoder.config["n_layers"], seed=0)
    left = [key for key, tensor in (*decoder.named_parameters(), *decoder.named_buffers()) if tensor.isnan().any()]
    assert not left
    tied = decoder.config["tie_embeddings"]
    assert (decoder.output_weight.data_ptr() == decoder.embedding.weight.data_ptr()) == tied
