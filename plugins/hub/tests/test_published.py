"""Presets against the published config.json and the classes of transformers: the same model, as many parameters."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.exporting import recognise
from blockwright.plugins.hub.family import difference
from blockwright.plugins.hub.importing import find
from blockwright.registry import presets

LAYERS = 4


def expanded(value: Any) -> Any:
    """With lists written out: ``{of: [a, b], times: 2}`` in one is a, b, a, b."""
    if isinstance(value, dict):
        return {key: expanded(inner) for key, inner in value.items()}
    if not isinstance(value, list):
        return value
    return [one for item in value for one in (item["of"] * item["times"] if isinstance(item, dict) else [item])]


PUBLISHED = expanded(yaml.safe_load((Path(__file__).parent / "published.yaml").read_text()))
CONFIGS, TOTALS = PUBLISHED["configs"], PUBLISHED["totals"]
QUICK = ("kimi_linear_48b_a3b", "smollm3_3b", "nemotron_h_8b")
# A norm that all layers of theirs share is one of each layer here: numbers of its copies.
COPIED = {"gemma4_e2b": 34 * 256, "gemma4_e4b": 41 * 256}
# Beginning of a preset's name: the family that it is written as. The same decoder may be another's: what was imported
# keeps its own. tiny: rotary positions in halves with latent attention, or interleaved ones without.
WRITTEN_AS: dict[str, str] = yaml.safe_load(
    """{ablation_moe_mha: deepseek, deepseek_moe_16b: deepseek, deepseek_vl2: deepseek_vl_v2,
    deepseek_vl2_tiny_language: deepseek, deepseek_vl2_small_language: deepseek_v2, deepseek_v3: deepseek_v3,
    deepseek_v3_2: deepseek_v32, deepseek_v4: deepseek_v4, deepseek_v4_1: none, deepseek_vl2_base_language:
    deepseek_v3, deepseek_7b: llama, deepseek_67b: llama, deepseek: deepseek_v2, ablation_7b: llama, gemma2: gemma2,
    gpt2: gpt2, gpt_oss: gpt_oss, llama: llama, mistral: mistral, mixtral: mixtral, olmo2: olmo2, olmoe: olmoe,
    qwen3: qwen3, qwen3_next: qwen3_next, qwen3_5_9b: qwen3_5_text, qwen3_5_35b: qwen3_next, glm_5: glm_moe_dsa,
    ling_3: bailing_hybrid, longcat_flash: longcat_flash, olmo_hybrid: olmo_hybrid, inkling: inkling_text,
    kimi_linear: kimi_linear, nemotron_h: nemotron_h, smollm3: smollm3, gemma3: gemma3_text, gemma4: gemma4_text,
    glm4_5: glm4_moe, minimax_m2: minimax_m2, apertus: apertus, qwen3_30b: qwen3_moe, tiny: none, tiny_recall: none,
    tiny_skills: none, kimi_k3: none, qwen3_8_flash: none, glm_5_3: glm5_next_text, huginn_3_5b: none, ouro_1_4b:
    none, ouro_2_6b: none}"""
)
# Layouts of presets whose patterns do not fit four layers.
SHORT: dict[str, Any] = yaml.safe_load(
    """{gemma3_27b: {attention: attention*3 full}, gemma4_31b: {attention: attention*3 full},
    gemma4_26b_a4b: {attention: attention*3 full},
    gemma4_e2b: &e {attention: attention full attention full, values: values*2 none*2, kv_source: lent*2 borrowed*2},
    gemma4_e4b: *e, deepseek_v4_flash: {attention: near*2 attention hca, gating: hash*3 gating},
    deepseek_v4_pro: {attention: hca*2 attention hca, gating: hash*3 gating},
    deepseek_v4_1_flash: {attention: near*2 attention decoder, memory: without first second without},
    inkling: {attention: attention*3 full, ffn: dense*2 ffn*}, glm_5_2: {ffn: dense*3 ffn, selector: selector*3 below},
    kimi_k3: {attention: linear*3 attention, ffn: dense*1 ffn*},
    glm_5_3_flash: {attention: linear*3 attention, ffn: dense*1 ffn*},
    qwen3_8_flash_next: {attention: linear*3 attention, memory: without*1 memory without*},
    ling_3_flash: {attention: linear*3 attention, ffn: dense*2 ffn*},
    kimi_linear_48b_a3b: {attention: linear*3 attention, ffn: dense*1 ffn*},
    nemotron_h_8b: {attention: attention full none attention, ffn: none*2 ffn none,
      residual: residual*2 mlp residual}}"""
)


def short(name: str) -> Decoder:
    """A preset with four layers, on the meta device."""
    model = {"vocab_size": 256, **presets.read(name), "n_layers": LAYERS}
    if "last" in model.get("loop", {}):
        model["loop"] = {**model["loop"], "last": LAYERS - 2}
    return compose({**model, "layout": SHORT.get(name, model.get("layout"))}, device="meta")


def assert_described(ours: Decoder, values: dict[str, Any]) -> None:
    assert difference(ours, compose(find(values).composition(values), device="meta")) is None


@pytest.mark.parametrize("name", CONFIGS)
def test_published_config_describes_the_preset(name: str) -> None:
    values = copy.deepcopy(CONFIGS[name])
    values.get("text_config", values)["num_hidden_layers"] = LAYERS
    assert_described(short(name), values)


def configuration(name: str, **more: Any) -> Any:
    """What transformers makes of the settings of a preset."""
    kind, settings = TOTALS[name]["class"], TOTALS[name].get("settings", {})
    text = "Text" if kind in ("Gemma3", "Gemma4", "Inkling") else ""  # which have towers
    return getattr(transformers, f"{kind}{text}Config")(**copy.deepcopy({**settings, **more}))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in TOTALS])
def test_preset_has_the_published_total_and_is_what_the_configuration_describes(name: str) -> None:
    ours = compose(preset(name), device="meta")
    assert sum(p.numel() for p in ours.parameters()) == TOTALS[name]["total"] + COPIED.get(name, 0)
    values = configuration(name, **TOTALS[name].get("beyond", {})).to_json_string(use_diff=False)
    assert_described(ours, json.loads(values))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOTALS)
def test_class_of_transformers_has_as_many(name: str) -> None:
    with torch.device("meta"):
        kind = TOTALS[name]["class"].removesuffix("Text")
        theirs = getattr(transformers, f"{kind}ForCausalLM")(configuration(name))
    # LongCat's class has rows for experts without parameters, which it never reads.
    idle = getattr(theirs.config, "zero_expert_num", 0)
    unread = sum(idle * p[0].numel() for n, p in theirs.named_parameters() if idle and n.endswith("gate_up_proj"))
    # Biases of choice are buffers here, and parameters of some classes.
    found = sum(p.numel() for n, p in theirs.named_parameters() if "correction_bias" not in n)
    assert found - unread == TOTALS[name]["total"]


@pytest.mark.slow
def test_every_preset_is_exported_as_its_family() -> None:
    for name in sorted(presets.names()):
        family, _, why = recognise(short(name), None, {})
        known = WRITTEN_AS[max((prefix for prefix in WRITTEN_AS if name.startswith(prefix)), key=len)]
        assert (known == "none" and why) or (family.model_type, why) == (known, None), name
