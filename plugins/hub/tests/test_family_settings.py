"""Settings of single families: what is refused by name, and what older or other files say with other keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import CASES, CONFIGS, SIZES, V
from safetensors.torch import load_file, save_file
from torch import nn

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.fingerprint import difference
from blockwright.plugins.hub.importing import find, import_folder
from blockwright.registry import ConfigError


def settings(name: str, **changed: Any) -> dict[str, Any]:
    """The config.json of a case; changes to None take keys away."""
    architecture, given = CASES[name]
    kind = CONFIGS.get(architecture, f"{architecture}Config")
    config = getattr(transformers, kind)(**copy.deepcopy({**SIZES, **given}))
    values = {**json.loads(config.to_json_string(use_diff=False)), **changed}
    return {key: value for key, value in values.items() if value is not None}


def composition(values: dict[str, Any]) -> dict[str, Any]:
    return find(values).composition(values)


SLOW = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0}


OTHER_MODELS: list[tuple[str, str, Any]] = [
    ("qwen2", "use_mrope", True),
    ("smollm3", "no_rope_layers", [1, 0]),
    ("smollm3", "no_rope_layers", [0, 0, 0, 0]),
    ("smollm3", "use_sliding_window", True),
    ("smollm3", "mlp_bias", True),
    ("smollm3", "num_key_value_heads", None),  # absent, the class has 4
    ("gemma3_text", "use_bidirectional_attention", True),
    ("gemma3_text", "layer_types", ["full_attention"]),
    ("gemma3_text", "rope_parameters", SLOW),
    ("gemma3_text", "rope_parameters.full_attention.rope_type", {"full_attention": {"rope_type": "longrope"}}),
    ("gemma3_text", "rope_scaling", "linear"),
    ("gemma4_text", "enable_moe_block", 1),
    ("gemma4_text experts", "num_experts", None),
    ("gemma4_text experts", "use_double_wide_mlp", True),
    ("gemma4_text", "use_bidirectional_attention", "all"),
    ("gemma4_text", "num_kv_shared_layers", 3),  # which leaves no full layer with keys of its own
    ("gemma4_text", "num_kv_shared_layers", -1),
    ("gemma4_text", "layer_types", ["full_attention", "sliding_attention"] * 2),
    ("gemma4_text", "vocab_size_per_layer_input", 5),
    ("gemma4_text", "rope_parameters", SLOW),
    ("glm4_moe", "n_shared_experts", None),
    ("glm4_moe", "rope_parameters.partial_rotary_factor", {**YARN, "partial_rotary_factor": 0.5}),
    ("glm4_moe", "rope_parameters.partial_rotary_factor", {**SLOW, "partial_rotary_factor": 1.5}),
    ("minimax_m2", "rotary_dim", 8),
    ("minimax_m2", "scoring_func", "softmax"),
    ("minimax_m2", "use_qk_norm", False),
    ("minimax_m2", "shared_intermediate_size", 8),
    ("apertus", "rope_parameters", None),
    ("apertus", "hidden_act", "silu"),
    ("qwen3_next", "mlp_only_layers", [1]),
    ("qwen3_next", "decoder_sparse_step", 2),
    ("qwen3_next", "use_sliding_window", True),
    ("qwen3_next", "linear_num_key_heads", None),
    ("qwen3_next", "attention_bias", True),
    ("qwen3_next", "layer_types", ["linear_attention"] * 4),
    ("qwen3_5_text", "attn_output_gate", False),
    ("qwen3_5_text", "output_gate_type", "sigmoid"),
    ("qwen3_5_moe_text", "norm_topk_prob", False),
    ("qwen3_5_moe_text", "linear_num_key_heads", None),
    ("glm_moe_dsa", "indexer_types", ["shared"] * 4),
    ("glm_moe_dsa", "indexer_types", ["full", "none", "full", "full"]),
    ("glm_moe_dsa", "indexer_rope_interleave", False),
    ("glm_moe_dsa", "mlp_layer_types", ["sparse"] * 4),
    ("glm_moe_dsa", "q_lora_rank", None),
    ("bailing_hybrid", "kda_lower_bound", 5.0),
    ("bailing_hybrid", "no_kda_lora", False),
    ("bailing_hybrid", "gated_attention_proj_granularity_type", "element_wise"),
    ("bailing_hybrid", "num_expert_group", None),  # absent, the class has 8
    ("bailing_hybrid", "use_linear_silu", True),  # of Ling 2.6
    ("longcat_flash", "zero_expert_type", "copy"),
    ("longcat_flash", "zero_expert_num", -1),
    ("longcat_flash", "mla_scale_kv_lora", False),
    ("longcat_flash", "router_bias", True),
    ("olmo_hybrid", "rope_parameters", None),
    ("olmo_hybrid", "attention_bias", True),
    ("kimi_linear", "mla_use_nope", False),
    ("kimi_linear", "moe_router_activation_func", "softmax"),
    ("kimi_linear", "linear_attn_config.safe_gate", {"safe_gate": True}),
    ("kimi_linear", "linear_attn_config", {"full_attn_layers": [1], "kda_layers": [2, 3]}),
    ("kimi_linear", "linear_attn_config", {"full_attn_layers": 2, "kda_layers": [1, 3, [4]]}),
    ("kimi_linear", "layer_types", {"full_attn_layers": [1], "kda_layers": [2, 3, 4]}),  # against layer_types
    ("kimi_linear", "first_k_dense_replace", 2),
    ("kimi_linear", "num_nextn_predict_layers", 1),
    ("inkling_text", "unpadded_vocab_size", 90),
    ("inkling_text", "shared_expert_sink", False),
    ("inkling_text", "n_shared_experts", 0),
    ("inkling_text", "mlp_layer_types", ["dense", "moe", "sparse", "sparse"]),
    ("inkling_text", "layer_types", ["hybrid", "full_attention", "hybrid", "hybrid"]),
    ("inkling_text", "num_mtp_layers", 8),
    ("inkling_text", "d_rel", "16"),
    ("nemotron_h", "layers_block_type", ["linear_attention", "mlp", "full_attention", "conv", "mlp"]),
    ("nemotron_h latent", "n_shared_experts", 2),
    ("nemotron_h", "hybrid_override_pattern", "M-*M*"),
    ("nemotron_h", "time_step_limit", [0.0, 0.1]),
    ("nemotron_h", "use_conv_bias", False),
    ("nemotron_h", "mlp_hidden_act", "silu"),
    ("nemotron_h", "sliding_window", 8),
    ("deepseek_v4", "compress_ratios", [0, "4", 8, 4]),
    ("deepseek_v4", "compress_rates", [4, 8]),
    ("deepseek_v4", "hc_eps", 1e-5),
    ("deepseek_v4", "mlp_layer_types", ["moe"]),
    ("deepseek_v4", "scoring_func", "sigmoid"),
    ("deepseek_v4", "num_key_value_heads", 2),
    ("deepseek_v4", "rope_parameters.compress", {"main": SLOW, "compress": 3}),
    (
        "deepseek_v4",
        "rope_parameters.compress.attention_factor",
        {"main": SLOW, "compress": {**YARN, "attention_factor": 1.3}},
    ),
]


@pytest.mark.parametrize("name", sorted({name for name, *_ in OTHER_MODELS}))
def test_what_would_be_another_model_is_refused_by_name(name: str) -> None:
    plain = settings(name)
    composition(copy.deepcopy(plain))
    nested = "linear_attn_config" if name == "kimi_linear" else "rope_parameters"
    for key, value in ((key, value) for case, key, value in OTHER_MODELS if case == name):
        changed = {**plain, nested if isinstance(value, dict) else key.split(".")[0]: value}
        with pytest.raises(ConfigError) as caught:
            composition(copy.deepcopy({key: given for key, given in changed.items() if given is not None}))
        assert caught.value.path == f"config.json: {key}"


HUB = {"num_experts": 8, "num_experts_per_token": 3, "num_shared_experts": 2, "num_expert_group": 1, "head_dim": 72}
KIMI = {"full_attn_layers": [2], "kda_layers": [1, 3, 4], "num_heads": 3, "head_dim": 5, "short_conv_kernel_size": 3}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
        ("qwen2", {"use_mrope": False, "sliding_window": 131072, "max_window_layers": 28}),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
        (
            "gemma3_text",
            {"rope_parameters": None, "rope_theta": 900.0, "rope_local_base_freq": 500.0, "layer_types": None}
            | {"rope_scaling": {"rope_type": "linear", "factor": 3.0}, "sliding_window_pattern": 2},
        ),
        ("glm4_moe", {"rope_parameters": None, "rope_theta": 500.0}),  # half of a head turns
        ("minimax_m2", {"rope_parameters": SLOW, "num_mtp_modules": 3, "attn_type_list": [1, 1, 1, 1]}),
        ("qwen3_5_text", {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "attn_output_gate": True}),
        ("glm_moe_dsa reused", {"indexer_types": None, "index_topk_pattern": "FSFS"}),
        ("glm_moe_dsa reused", {"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 1}),
        ("bailing_hybrid", {"head_dim": 5, "linear_head_dim": None, "linear_num_heads": None, "no_kda_lora": True}),
        ("bailing_hybrid", {"n_group": 4, "num_expert_group": None, "score_function": "sigmoid"}),
        ("kimi_linear", {**HUB, "linear_attn_config": KIMI, "layer_types": None, "linear_num_heads": None}),
        ("kimi_linear", {"mlp_layer_types": None, "first_k_dense_replace": 1, "rope_theta": 10000.0}),
        (
            "inkling_text",
            {"mlp_layer_types": None, "dense_mlp_idx": 1, "dense_intermediate_size": 37, "intermediate_size": 13}
            | {"moe_intermediate_size": None, "conv_kernel_size": None, "sconv_kernel_size": 3},
        ),
        ("inkling_text", {"layer_types": None, "local_layer_ids": [0, 2], "unpadded_vocab_size": V}),
        ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M-*M-", "mamba_n_groups": 3}),
        ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp"], "time_step_limit": None}),
    ],
)
def test_other_keys_mean_the_same_model(name: str, keys: dict[str, Any]) -> None:
    one, other = (compose(composition(settings(name, **more)), device="meta") for more in ({}, keys))
    assert difference(one, other) is None


@pytest.mark.parametrize(
    "name",
    [
        "smollm3",
        "gemma3_text",
        "glm4_moe",
        "minimax_m2",
        "qwen3_next",
        "qwen3_5_text",
        "bailing_hybrid",
        "longcat_flash",
    ],
)
def test_absent_positions_are_those_of_the_class(name: str) -> None:
    architecture, given = CASES[name]
    given = {key: value for key, value in given.items() if key != "rope_parameters"}
    kind = CONFIGS.get(architecture, f"{architecture}Config")
    config = getattr(transformers, kind)(**copy.deepcopy({**SIZES, **given}))
    values = json.loads(config.to_json_string(use_diff=False))
    absent = {key: value for key, value in values.items() if key != "rope_parameters"}
    assert composition(absent)["position"] == composition(values)["position"]
    assert composition(absent).get("variants") == composition(values).get("variants")


@pytest.mark.parametrize("name", ["olmo_hybrid turning"])
def test_names_under_which_transformers_saves_are_read_too(
    name: str, foreign: Callable[..., nn.Module], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    foreign(name).save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    names = [load_file(folder / "model.safetensors").keys() for folder in (tmp_path / "saved", checkpoint(name))]
    assert names[0] != names[1]
    import_folder(tmp_path / "saved", tmp_path / "one")
    import_folder(checkpoint(name), tmp_path / "other")
    one, other = (load_file(tmp_path / folder / "model.safetensors") for folder in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_group_of_ling_that_is_cut_short_is_refused() -> None:
    values = settings("bailing_hybrid", layer_types=None)
    assert composition({**values, "layer_group_size": 4})["layout"]["attention"] == ["linear"] * 3 + ["attention"]
    with pytest.raises(ConfigError, match="must divide the 4 layers") as caught:
        composition({**values, "layer_group_size": 3})
    assert caught.value.path == "config.json: layer_group_size"


@pytest.fixture
def with_vision(checkpoint: Callable[..., Path]) -> Path:
    """A Qwen3.5 as released: its language model, a tower, and a head of prediction, in one file."""
    folder = checkpoint("qwen3_5_text")
    tensors = load_file(folder / "model.safetensors")
    moved = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    others = {name: torch.ones(3) for name in ("model.visual.merger.norm.weight", "mtp.fc.weight")}
    save_file({**moved, **others}, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text())
    whole = {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 3}, "image_token_id": 5}
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def test_language_model_is_read_out_of_a_model_that_sees(
    with_vision: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import_folder(with_vision, tmp_path / "out")
    import_folder(checkpoint("qwen3_5_text"), tmp_path / "alone")
    found, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "alone"))
    assert found.keys() == alone.keys() and all(torch.equal(found[key], alone[key]) for key in found)
    assert export_folder(tmp_path / "out", tmp_path / "hf")[0] == "qwen3_5_text"
    with pytest.raises(ConfigError, match="a language model alone is written as qwen3_5_text"):
        export_folder(tmp_path / "out", tmp_path / "no", family="qwen3_5")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"head_dim": None}, "text_config.head_dim"),
        ({"model_type": "qwen3_next"}, "text_config.model_type"),
        ({"surprise": 1}, "text_config.surprise"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    ],
)
def test_wrong_setting_of_an_inner_model_is_refused_with_its_path(
    change: dict[str, Any], path: str, with_vision: Path, tmp_path: Path
) -> None:
    values = json.loads((with_vision / "config.json").read_text())
    values["text_config"] |= change
    (with_vision / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        import_folder(with_vision, tmp_path / "out")
    assert caught.value.path == f"config.json: {path}" and not (tmp_path / "out").exists()


def test_head_of_prediction_of_qwen3_next_is_left_out(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = checkpoint("qwen3_next") / "model.safetensors"
    save_file({**load_file(file), "mtp.fc.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    import_folder(file.parent, tmp_path / "out")
    assert not any("mtp" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_curve_of_apertus_with_another_slope_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file, name = checkpoint("apertus") / "model.safetensors", "model.layers.2.mlp.act_fn.beta"
    save_file({**load_file(file), name: torch.tensor(0.4)}, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"must be 0\.5") as caught:
        import_folder(file.parent, tmp_path / "out")
    assert name in caught.value.path and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "heads", [{"1": {"head_dim": 20}, "3": {"head_dim": 8}}, {"1": {"head_dim": 20}}, {"1": 3, "3": 3}]
)
def test_full_layers_of_different_heads_are_refused(heads: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        composition(settings("gemma4_text", per_layer_config=heads))
    assert caught.value.path == "config.json: per_layer_config"


def test_heads_of_full_layers_are_read_by_layer_or_from_older_keys() -> None:
    by_layer = settings("gemma4_text tied values")
    older = {**by_layer, "per_layer_config": None, "global_head_dim": 20, "num_global_key_value_heads": 3}
    one, other = (compose(composition(values), device="meta") for values in (by_layer, older))
    assert difference(one, other) is None


def test_keys_of_borrowing_layers_in_a_released_file_are_skipped(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("gemma4_text")
    tensors = load_file(folder / "model.safetensors")
    extra = {f"model.layers.3.self_attn.{name}_proj.weight": torch.zeros(8, 42) for name in "kv"}
    save_file({**tensors, **extra}, folder / "model.safetensors", {"format": "pt"})
    import_folder(folder, tmp_path / "out")
    assert "layers.3.attention.key.weight" not in load(tmp_path / "out").state_dict()
