"""Settings of single families: what is refused by name, what older or other files say with other keys."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from foreign_models import CASES, CONFIGS, SIZES, SLOW, V
from pairwise import each
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from blockwright.blocks.compose import compose
from blockwright.plugins.hub.config import idle
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.families.catalogue import FAMILIES
from blockwright.plugins.hub.family import difference
from blockwright.plugins.hub.importing import find, import_folder
from blockwright.registry import ConfigError, presets


def settings(name: str, without: str = "", **changed: Any) -> dict[str, Any]:
    """The config.json of a case, made without a key; changes to None take keys away."""
    architecture, given = CASES[name]
    kind = CONFIGS.get(architecture, f"{architecture}Config")
    given = {key: value for key, value in {**SIZES, **given}.items() if key != without}
    config = getattr(transformers, kind)(**copy.deepcopy(given))
    values = {**json.loads(config.to_json_string(use_diff=False)), **changed}
    return {key: value for key, value in values.items() if value is not None or without}


def composition(values: dict[str, Any]) -> dict[str, Any]:
    return find(values).composition(values)


YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 8.0}
# Case → keys and values that would be another model; None: absent, where the class has another value, or none.
OTHER_MODELS: dict[str, list[tuple[str, Any]]] = {
    "qwen2": [("use_mrope", True)],
    "mistral windowed": [("sliding_window", None)],
    "gemma2": [("attn_logit_softcapping", None), ("final_logit_softcapping", None)],
    "gpt_oss": [("rope_parameters", None)],
    "deepseek_v3": [("routed_scaling_factor", None)],
    "deepseek_v32": [("routed_scaling_factor", None)],
    "smollm3": [("no_rope_layers", [1, 0]), ("no_rope_layers", [0, 0, 0, 0]), ("use_sliding_window", True),
        ("mlp_bias", True), ("num_key_value_heads", None)],
    "gemma3_text": [("use_bidirectional_attention", True), ("layer_types", ["full_attention"]),
        ("rope_parameters", SLOW),
        ("rope_parameters.full_attention.rope_type", {"full_attention": {"rope_type": "longrope"}}),
        ("rope_scaling", "linear")],
    "gemma4_text": [("per_layer_config", {"1": {"head_dim": 20}, "3": {"head_dim": 8}}),
        ("per_layer_config", {"1": {"head_dim": 20}}), ("per_layer_config", {"1": 3, "3": 3}),
        ("enable_moe_block", 1), ("use_bidirectional_attention", "all"), ("num_kv_shared_layers", 3),
        ("num_kv_shared_layers", -1),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]),
        ("vocab_size_per_layer_input", 5), ("rope_parameters", SLOW)],
    "gemma4_text experts": [("num_experts", None), ("use_double_wide_mlp", True)],
    "glm4_moe": [("n_shared_experts", None),
        ("rope_parameters.partial_rotary_factor", {**YARN, "partial_rotary_factor": 0.5}),
        ("rope_parameters.partial_rotary_factor", {**SLOW, "partial_rotary_factor": 1.5})],
    "minimax_m2": [("rotary_dim", 8), ("scoring_func", "softmax"), ("use_qk_norm", False),
        ("shared_intermediate_size", 8)],
    "apertus": [("rope_parameters", None), ("hidden_act", "silu")],
    "qwen3_next": [("mlp_only_layers", [1]), ("decoder_sparse_step", 2), ("use_sliding_window", True),
        ("linear_num_key_heads", None), ("attention_bias", True),
        ("layer_types", ["linear_attention", "linear_attention", "linear_attention", "linear_attention"])],
    "qwen3_5_text": [("attn_output_gate", False), ("output_gate_type", "sigmoid")],
    "qwen3_5_moe_text": [("norm_topk_prob", False), ("linear_num_key_heads", None)],
    "glm_moe_dsa": [("indexer_types", ["shared", "shared", "shared", "shared"]),
        ("indexer_types", ["full", "none", "full", "full"]), ("indexer_rope_interleave", False),
        ("mlp_layer_types", ["sparse", "sparse", "sparse", "sparse"]), ("q_lora_rank", None)],
    "bailing_hybrid": [("kda_lower_bound", 5.0), ("no_kda_lora", False),
        ("gated_attention_proj_granularity_type", "element_wise"), ("num_expert_group", None),
        ("use_linear_silu", True)],
    "longcat_flash": [("zero_expert_type", "copy"), ("zero_expert_num", -1), ("mla_scale_kv_lora", False),
        ("router_bias", True)],
    "olmo_hybrid": [("rope_parameters", None), ("attention_bias", True)],
    "kimi_linear": [("mla_use_nope", False), ("moe_router_activation_func", "softmax"),
        ("linear_attn_config.safe_gate", {"safe_gate": True}),
        ("linear_attn_config", {"full_attn_layers": [1], "kda_layers": [2, 3]}),
        ("linear_attn_config", {"full_attn_layers": 2, "kda_layers": [1, 3, [4]]}),
        ("layer_types", {"full_attn_layers": [1], "kda_layers": [2, 3, 4]}), ("first_k_dense_replace", 2),
        ("num_nextn_predict_layers", 1)],
    "inkling_text": [("unpadded_vocab_size", 90), ("shared_expert_sink", False), ("n_shared_experts", 0),
        ("mlp_layer_types", ["dense", "moe", "sparse", "sparse"]),
        ("layer_types", ["hybrid", "full_attention", "hybrid", "hybrid"]), ("num_mtp_layers", 8), ("d_rel", "16")],
    "nemotron_h": [("layers_block_type", ["linear_attention", "mlp", "full_attention", "conv", "mlp"]),
        ("hybrid_override_pattern", "M-*M*"), ("time_step_limit", [0.0, 0.1]), ("use_conv_bias", False),
        ("mlp_hidden_act", "silu"), ("sliding_window", 8)],
    "nemotron_h latent": [("n_shared_experts", 2)],
    "deepseek_v2": [("scoring_func", "sigmoid"), ("topk_method", "soft"), ("moe_layer_freq", 2),
        ("first_k_dense_replace", 9)],
    "deepseek_v4": [("compress_ratios", [0, "4", 8, 4]), ("compress_rates", [4, 8]), ("hc_eps", 1e-05),
        ("mlp_layer_types", ["moe"]), ("scoring_func", "sigmoid"), ("num_key_value_heads", 2),
        ("rope_parameters.compress", {"main": SLOW, "compress": 3}),
        ("rope_parameters.compress.attention_factor", {"main": SLOW, "compress": {**YARN, "attention_factor": 1.3}})],
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_what_would_be_another_model_is_refused_by_name(name: str) -> None:
    plain = settings(name)
    composition(copy.deepcopy(plain))
    nested = "linear_attn_config" if name == "kimi_linear" else "rope_parameters"
    for key, value in OTHER_MODELS[name]:
        place = nested if isinstance(value, dict) and key != "per_layer_config" else key.split(".")[0]
        changed = {key: given for key, given in {**plain, place: value}.items() if given is not None}
        with pytest.raises(ConfigError) as caught:
            composition(copy.deepcopy(changed))
        assert caught.value.path == f"config.json: {key}"


HUB = {"num_experts": 8, "num_experts_per_token": 3, "num_shared_experts": 2, "num_expert_group": 1, "head_dim": 72}
KIMI = {"full_attn_layers": [2], "kda_layers": [1, 3, 4], "num_heads": 3, "head_dim": 5, "short_conv_kernel_size": 3}
OTHER_KEYS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}}),
    ("qwen2", {"use_mrope": False, "sliding_window": 131072, "max_window_layers": 28}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}),
    ("gemma3_text", {"rope_parameters": None, "rope_theta": 900.0, "rope_local_base_freq": 500.0, "layer_types": None,
                     "rope_scaling": {"rope_type": "linear", "factor": 3.0}, "sliding_window_pattern": 2}),
    ("gemma4_text tied values", {"per_layer_config": None, "global_head_dim": 20, "num_global_key_value_heads": 3}),
    ("glm4_moe", {"rope_parameters": None, "rope_theta": 500.0}),  # half of a head turns
    ("minimax_m2", {"rope_parameters": SLOW, "num_mtp_modules": 3, "attn_type_list": [1, 1, 1, 1]}),
    ("qwen3_5_text", {"mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "attn_output_gate": True}),
    ("glm_moe_dsa reused", {"indexer_types": None, "index_topk_pattern": "FSFS"}),
    ("glm_moe_dsa reused", {"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 1}),
    ("bailing_hybrid", {"head_dim": 5, "linear_head_dim": None, "linear_num_heads": None, "no_kda_lora": True}),
    ("bailing_hybrid", {"n_group": 4, "num_expert_group": None, "score_function": "sigmoid"}),
    ("kimi_linear", {**HUB, "linear_attn_config": KIMI, "layer_types": None, "linear_num_heads": None}),
    ("kimi_linear", {"mlp_layer_types": None, "first_k_dense_replace": 1, "rope_theta": 10000.0}),
    ("inkling_text", {"mlp_layer_types": None, "dense_mlp_idx": 1, "dense_intermediate_size": 37,
                      "intermediate_size": 13, "moe_intermediate_size": None, "conv_kernel_size": None,
                      "sconv_kernel_size": 3}),
    ("inkling_text", {"layer_types": None, "local_layer_ids": [0, 2], "unpadded_vocab_size": V}),
    ("nemotron_h", {"layers_block_type": None, "hybrid_override_pattern": "M-*M-", "mamba_n_groups": 3}),
    ("nemotron_h", {"layers_block_type": ["mamba", "mlp", "attention", "mamba", "mlp"], "time_step_limit": None}),
]  # fmt: skip


@pytest.mark.parametrize("name", dict(OTHER_KEYS))
def test_other_keys_mean_the_same_model(name: str) -> None:
    one = compose(composition(settings(name)), device="meta")
    for keys in (keys for case, keys in OTHER_KEYS if case == name):
        assert difference(one, compose(composition(settings(name, **keys)), device="meta")) is None, keys


def test_absent_positions_are_those_of_the_class() -> None:
    for name in ("mixtral", "smollm3", "gemma3_text", "glm4_moe", "minimax_m2", "qwen3_next", "qwen3_5_text",
                 "bailing_hybrid", "longcat_flash"):  # fmt: skip
        values = settings(name, "rope_parameters")
        absent = {key: value for key, value in values.items() if key != "rope_parameters"}
        found, expected = composition(absent), composition(values)
        assert all(found.get(key) == expected.get(key) for key in ("position", "variants")), name
    ling = settings("bailing_hybrid", layer_types=None)
    assert composition({**ling, "layer_group_size": 4})["layout"]["attention"] == ["linear"] * 3 + ["attention"]
    with pytest.raises(ConfigError) as caught:  # a group cut short
        composition({**ling, "layer_group_size": 3})
    assert caught.value.path == "config.json: layer_group_size"


# ---- keys of every model ---------------------------------------------------------------------------------------------

# Families whose classes transformers has not, and a preset that is written as one.
NO_CLASS = {"deepseek": "deepseek_moe_16b", "deepseek_vl_v2": "deepseek_vl2_tiny"}
TOKENS = [f"{name}_id" for name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES]
# Of files that transformers 4 and other tools wrote, which 5.24 reads too.
OLDER: dict[str, Any] = {
    **dict.fromkeys(("_attn_implementation_autoset", "_flash_attn_2_enabled", "output_past"), True),
    **dict.fromkeys(("add_cross_attention", "gradient_checkpointing", "is_decoder", "output_attentions"), False),
    **dict.fromkeys(("tf_legacy_loss", "tie_encoder_decoder", "torchscript", "use_bfloat16"), False),
    **dict.fromkeys(("cross_attention_hidden_size", "finetuning_task", "prefix", "xla_device"), None),
    "_commit_hash": "1a2b",
    "_num_labels": 2,
    "num_labels": 2,
    "decoder_start_token_id": 3,
    "pruned_heads": {},
    "attn_implementation": "eager",
    "experts_implementation": "eager",
    "tie_last_hidden_states": True,
    "tokenizer_class": "LlamaTokenizer",
    "torch_dtype": "bfloat16",
    "task_specific_params": {"text-generation": {"do_sample": True}},
    "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
}


def saved(model_type: str, use_diff: bool, **ids: int) -> dict[str, Any]:
    """The config.json of a family as transformers writes it, the first of the tiny models where there is one."""
    if model_type in NO_CLASS:
        text = FAMILIES[model_type].config(
            compose({**presets.read(NO_CLASS[model_type]), "n_layers": 2}, device="meta")
        )
        return {**PreTrainedConfig().to_dict(), **text, **ids}
    kind = CONFIG_MAPPING[model_type]
    cases = {CONFIGS.get(name, f"{name}Config"): given for name, given in reversed(CASES.values())}
    given = {**SIZES, **cases[kind.__name__]} if kind.__name__ in cases else {}
    config = kind(**copy.deepcopy(given))
    for one in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for key, value in ids.items():
            setattr(one, key, value)
    return json.loads(config.to_json_string(use_diff=use_diff))


@pytest.mark.parametrize(("model_type", "use_diff"), each(list(FAMILIES), [True, False]))
def test_keys_of_every_model_change_nothing_and_are_read(model_type: str, use_diff: bool) -> None:
    plain = saved(model_type, use_diff)
    known = find(plain).composition(plain)
    values = saved(model_type, use_diff, **dict.fromkeys(TOKENS, 3))
    assert {*TOKENS} <= values.keys()
    assert find(values).composition(values) == known
    everywhere = {key: value or 1 for key, value in GenerationConfig().to_dict().items()} | OLDER
    values |= {key: value for key, value in everywhere.items() if key not in plain}
    assert find(values).composition(values) == known


def test_a_reason_is_known_for_each_key_that_transformers_writes_for_every_model() -> None:
    keys = {*PreTrainedConfig().to_dict(), *GenerationConfig().to_dict(), *TOKENS} - {"model_type"}
    assert {key for key in keys if not idle(key)} == set()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def with_tensors(folder: Path, to: Path, **values: Any) -> dict[str, torch.Tensor]:
    """What is imported of a checkpoint with other tensors."""
    file = folder / "model.safetensors"
    save_file({**load_file(file), **values}, file, metadata={"format": "pt"})
    import_folder(folder, to)
    return load_file(to / "model.safetensors")


def test_tensors_that_are_not_of_the_model_are_left_out_and_a_curve_with_another_slope_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    lent = {f"model.layers.3.self_attn.{name}_proj.weight": torch.zeros(8, 42) for name in "kv"}
    assert "layers.3.attention.key.weight" not in with_tensors(checkpoint("gemma4_text"), tmp_path / "lent", **lent)
    mtp = with_tensors(checkpoint("qwen3_next"), tmp_path / "mtp", **{"mtp.fc.weight": torch.ones(3)})
    assert not any("mtp" in name for name in mtp)
    curve = "model.layers.2.mlp.act_fn.beta"
    with pytest.raises(ConfigError) as caught:
        with_tensors(checkpoint("apertus"), tmp_path / "out", **{curve: torch.tensor(0.4)})
    assert curve in caught.value.path and not (tmp_path / "out").exists()


def equal(one: Path, other: Path) -> bool:
    """Whether two imports hold the same tensors."""
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_names_under_which_transformers_saves_are_read_too(
    foreign: Callable[..., nn.Module], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    name, saved = "olmo_hybrid turning", tmp_path / "saved"
    foreign(name).save_pretrained(saved)  # type: ignore[operator]
    released = checkpoint(name)
    assert load_file(saved / "model.safetensors").keys() != load_file(released / "model.safetensors").keys()
    import_folder(saved, tmp_path / "one")
    import_folder(released, tmp_path / "other")
    assert equal(tmp_path / "one", tmp_path / "other")


INNER: list[tuple[str, dict[str, Any]]] = [
    ("text_config.head_dim", {"head_dim": None}),
    ("text_config.model_type", {"model_type": "qwen3_next"}),
    ("text_config.surprise", {"surprise": 1}),
    ("num_hidden_layers", {"num_hidden_layers": 10**9}),
]


def test_language_model_is_read_out_of_a_model_that_sees(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """A Qwen3.5 as released: its language model, a tower, and a head of prediction, in one file."""
    folder = checkpoint("qwen3_5_text")
    import_folder(folder, tmp_path / "alone")
    tensors, text = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    moved = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    others = {name: torch.ones(3) for name in ("model.visual.merger.norm.weight", "mtp.fc.weight")}
    save_file({**moved, **others}, folder / "model.safetensors", metadata={"format": "pt"})
    whole = {"model_type": "qwen3_5", "vision_config": {"depth": 3}, "image_token_id": 5}
    for path, change in (*INNER, (None, {})):
        (folder / "config.json").write_text(json.dumps({**whole, "text_config": {**text, **change}}))
        if path is None:
            import_folder(folder, tmp_path / "out")
            break
        with pytest.raises(ConfigError) as caught:
            import_folder(folder, tmp_path / "out")
        assert caught.value.path == f"config.json: {path}" and not (tmp_path / "out").exists()
    assert equal(tmp_path / "out", tmp_path / "alone")
    assert export_folder(tmp_path / "out", tmp_path / "hf")[0] == "qwen3_5_text"
    with pytest.raises(ConfigError):
        export_folder(tmp_path / "out", tmp_path / "no", family="qwen3_5")
