"""Presets that no family of checkpoints reads yet, against the classes of transformers: as many parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from blocks.compose import compose, preset

NEMOTRON = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
KIMI = {
    "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
    "kda_layers": sorted({*range(1, 28)} - {4, 8, 12, 16, 20, 24, 27}),
}
# preset → total, the class, and its settings where they are not the class's defaults
TOTALS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "kimi_linear_48b_a3b": (49_122_675_072, "KimiLinear", {"linear_attn_config": KIMI}),
    "qwen3_next_80b_a3b": (79_674_391_296, "Qwen3Next", {}),
    "olmo_hybrid_7b": (7_430_870_688, "OlmoHybrid", {}),
    "smollm3_3b": (3_075_098_624, "SmolLM3", {}),
    "gemma3_27b": (
        27_009_346_304,
        "Gemma3",
        {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62, "num_attention_heads": 32}
        | {"num_key_value_heads": 16, "head_dim": 128},
    ),
    "glm4_5_air": (106_852_245_504, "Glm4Moe", {"attention_bias": True, "head_dim": 128}),
    "minimax_m2": (228_689_748_992, "MiniMaxM2", {}),
    "apertus_8b": (8_053_338_176, "Apertus", {"num_key_value_heads": 8, "intermediate_size": 21504}),
    "nemotron_h_8b": (
        8_100_852_736,
        "NemotronH",
        {"hybrid_override_pattern": NEMOTRON, "num_hidden_layers": 52},
    ),
}


@pytest.mark.parametrize("name", TOTALS)
def test_preset_has_as_many_parameters_as_published(name: str) -> None:
    assert sum(p.numel() for p in compose(preset(name), device="meta").parameters()) == TOTALS[name][0]


@pytest.mark.parametrize("name", TOTALS)
def test_class_of_transformers_has_as_many(name: str) -> None:
    total, architecture, settings = TOTALS[name]
    kind = "Gemma3TextConfig" if architecture == "Gemma3" else f"{architecture}Config"
    with torch.device("meta"):
        theirs = getattr(transformers, f"{architecture}ForCausalLM")(getattr(transformers, kind)(**settings))
    # Biases of choice are buffers here, and parameters of some classes.
    assert sum(p.numel() for n, p in theirs.named_parameters() if "correction_bias" not in n) == total
