"""The tiny models of these tests, as ``transformers`` describes them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

V, D, LAYERS = 97, 42, 4
IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
SIZES = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": LAYERS, "max_position_embeddings": 128, **IDS}
SLOW = {"rope_type": "default", "rope_theta": 500.0}
ROPE = {"rope_parameters": SLOW}
GROUPED = {"num_attention_heads": 6, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 12}
EVEN = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
DENSE = {"intermediate_size": 37}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FEW = {"num_local_experts": 5, "num_experts_per_tok": 2}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "rms_norm_eps": 0.01,  # the norm of a nearly empty state would magnify its rounding
}
DELTA = {
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 7,
    "linear_conv_kernel_dim": 3,
}
COMPRESSED = ("heavily_compressed", "compressed_sparse")
LINEAR = {"rope_type": "linear", "factor": 3.0}
WINDOW = {"sliding_window": 9}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
SHARP = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
MLA = {
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
}
MIXTURE = {
    "moe_intermediate_size": 13,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    **DENSE,
}
GROUPS = {"n_group": 4, "topk_group": 2}

GEMMA4 = {
    **HEADS,
    **DENSE,
    **WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": V,
    "final_logit_softcapping": 7.0,
    "rope_parameters": {
        "sliding_attention": SLOW,
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 900.0},
    },
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**HEADS, **DENSE, **ROPE}),
    "llama tied biased": ("Llama", {**HEADS, **DENSE, **ROPE, "attention_bias": True, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", {"vocab_size": V, "n_embd": D, "n_layer": LAYERS, "n_head": 6, "n_positions": 64, **IDS}),
    "mixtral": ("Mixtral", {**HEADS, "intermediate_size": 13, **ROPE, "num_local_experts": 5}),
    "llama llama3": ("Llama", {**HEADS, **DENSE, "rope_parameters": LLAMA3}),
    "llama linear": ("Llama", {**HEADS, **DENSE, "rope_parameters": {**ROPE["rope_parameters"], **LINEAR}}),
    "llama yarn": ("Llama", {**HEADS, **DENSE, "rope_parameters": YARN}),
    "llama yarn reversed": ("Llama", {**HEADS, **DENSE, "rope_parameters": {**YARN, "beta_slow": 1000.0}}),
    "mistral": ("Mistral", {**HEADS, **DENSE, **ROPE, "sliding_window": None}),
    "mistral windowed": ("Mistral", {**HEADS, **DENSE, **ROPE, "sliding_window": 9}),
    "mixtral windowed": ("Mixtral", {**HEADS, "intermediate_size": 13, **ROPE, "num_local_experts": 5, **WINDOW}),
    "qwen2": ("Qwen2", {**EVEN, **DENSE, **ROPE}),
    "qwen3": ("Qwen3", {**HEADS, **DENSE, **ROPE}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**HEADS, **DENSE, **ROPE, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 13}
        | {"norm_topk_prob": True},
    ),
    "olmo2": ("Olmo2", {**EVEN, **DENSE, **ROPE}),
    "olmoe": ("Olmoe", {**EVEN, "intermediate_size": 13, **ROPE, "num_experts": 5, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "GptOss",
        {**HEADS, "intermediate_size": 13, "rope_parameters": {**YARN, "truncate": False}, **WINDOW}
        | {"num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "gemma2": ("Gemma2", {**HEADS, **DENSE, **ROPE, **WINDOW, "query_pre_attn_scalar": 48}),
    "gemma2 uncapped": (
        "Gemma2",
        {**HEADS, **DENSE, **ROPE, **WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "smollm3": ("SmolLM3", {**EVEN, **DENSE, **ROPE, "no_rope_layers": [1, 0, 1, 0]}),
    "gemma3_text": (
        "Gemma3Text",
        {**HEADS, **DENSE, **WINDOW, "query_pre_attn_scalar": 20, "sliding_window_pattern": 2}
        | {"rope_parameters": {"sliding_attention": SLOW, "full_attention": {**SLOW, "rope_theta": 900.0, **LINEAR}}},
    ),
    "gemma4_text": (
        "Gemma4Text",
        {**GEMMA4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "global_head_dim": 8},
    ),
    "gemma4_text tied values": (
        "Gemma4Text",
        {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "global_head_dim": 20}
        | {"num_global_key_value_heads": 3},
    ),
    "gemma4_text experts": (
        "Gemma4Text",
        {**GEMMA4, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "global_head_dim": 20}
        | {"num_global_key_value_heads": 3, "enable_moe_block": True, "num_experts": 5, "top_k_experts": 2}
        | {"moe_intermediate_size": 13},
    ),
    "glm4_moe": ("Glm4Moe", {**HEADS, **MIXTURE, **ROPE, **GROUPS, "attention_bias": True, "use_qk_norm": True}),
    "glm4_moe air": (
        "Glm4Moe",
        {**HEADS, **MIXTURE, **ROPE, "partial_rotary_factor": 0.34, "routed_scaling_factor": 1.0},
    ),
    "minimax_m2": ("MiniMaxM2", {**HEADS, "intermediate_size": 13, **ROPE, **FEW, "rotary_dim": 6}),
    "apertus": ("Apertus", {**EVEN, **DENSE, "rope_parameters": LLAMA3}),
    "qwen3_next": (
        "Qwen3Next",
        {**GROUPED, "head_dim": 16, **ROPE, **DELTA, "num_experts": 5, "num_experts_per_tok": 2, **HYBRID}
        | {"moe_intermediate_size": 13, "shared_expert_intermediate_size": 11},
    ),
    "qwen3_5_text": ("Qwen3_5Text", {**GROUPED, "head_dim": 16, **DENSE, **ROPE, **DELTA, **HYBRID}),
    "qwen3_5_text tied": (
        "Qwen3_5Text",
        {**GROUPED, "head_dim": 16, **DENSE, **ROPE, **DELTA, **HYBRID, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        {**GROUPED, "head_dim": 16, **ROPE, **DELTA, "num_experts": 5, "num_experts_per_tok": 2, **HYBRID}
        | {"moe_intermediate_size": 13, "shared_expert_intermediate_size": 11},
    ),
    "olmo_hybrid": (
        "OlmoHybrid",
        {**EVEN, **DENSE, **DELTA, **HYBRID, "rope_parameters": {**SLOW, "rope_theta": None}},
    ),
    "olmo_hybrid turning": (
        "OlmoHybrid",
        {**EVEN, **DENSE, **ROPE, **HYBRID, "linear_key_head_dim": 5, "linear_value_head_dim": 5}
        | {"linear_allow_neg_eigval": False},
    ),
    "kimi_linear": (
        "KimiLinear",
        {**MLA, **MIXTURE, **HYBRID, "n_routed_experts": None, "num_local_experts": 8, "linear_num_heads": 3}
        | {"linear_head_dim": 5, "linear_conv_kernel_dim": 3, "q_lora_rank": 13},
    ),
    "inkling_text": (
        "Inkling",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "swa_num_attention_heads": 4}
        | {"swa_num_key_value_heads": 4, "swa_head_dim": 10, "sliding_window_size": 5, "d_rel": 3, "rel_extent": 9}
        | {"log_scaling_n_floor": 8, "layer_types": ["hybrid_sliding", "hybrid"] * 2, "conv_kernel_size": 3}
        | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "moe_intermediate_size": 13, "route_scale": 2.5}
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "logits_mup_width_multiplier": 0.3, **DENSE},
    ),
    "inkling_text unscaled": (
        "Inkling",
        {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12, "swa_num_attention_heads": 6}
        | {"swa_num_key_value_heads": 2, "swa_head_dim": 12, "sliding_window_size": 5, "d_rel": 3, "rel_extent": 4}
        | {"local_layer_ids": [0, 3], "moe_intermediate_size": 13, "n_routed_experts": 8, "num_experts_per_tok": 2}
        | {"n_shared_experts": 1, "logits_mup_width_multiplier": 0.1, **DENSE},
    ),
    "bailing_hybrid": (
        "BailingHybrid",
        {**MLA, **MIXTURE, **HYBRID, **ROPE, **GROUPS, "n_routed_experts": None, "num_local_experts": 8}
        | {"head_dim": 5, "short_conv_kernel_size": 3},
    ),
    "bailing_hybrid unbounded": (
        "BailingHybrid",
        {**MLA, **MIXTURE, **HYBRID, "rope_parameters": SHARP, **GROUPS, "n_routed_experts": None}
        | {"num_local_experts": 8, "head_dim": 5, "short_conv_kernel_size": 3, "q_lora_rank": 13}
        | {"kda_safe_gate": False},
    ),
    "longcat_flash": (
        "LongcatFlash",
        {**MLA, **ROPE, "q_lora_rank": 13, "ffn_hidden_size": 37, "expert_ffn_hidden_size": 13, "moe_topk": 3}
        | {"n_routed_experts": 5, "zero_expert_num": 3, "routed_scaling_factor": 2.5, "head_dim": 6},
    ),
    "nemotron_h": (
        "NemotronH",
        {**HEADS, **DENSE, "ssm_state_size": 5, "mamba_num_heads": 6, "mamba_head_dim": 7, "n_groups": 3}
        | {"hybrid_override_pattern": "M-*M-", "time_step_min": 0.01, "conv_kernel": 3, "num_hidden_layers": 5}
        | {"layer_norm_epsilon": 0.01},
    ),
    "nemotron_h latent": (
        "NemotronH",
        {**HEADS, **DENSE, "ssm_state_size": 5, "mamba_num_heads": 6, "mamba_head_dim": 7, "n_groups": 3}
        | {"hybrid_override_pattern": "ME*E-", "conv_kernel": 3, "num_hidden_layers": 5, "layer_norm_epsilon": 0.01}
        | {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 3, "topk_group": 2, "moe_latent_size": 11}
        | {"moe_intermediate_size": 13, "moe_shared_expert_intermediate_size": 9, "routed_scaling_factor": 2.5},
    ),
    "deepseek_v3": ("DeepseekV3", {**MLA, **MIXTURE, **ROPE, **GROUPS, "q_lora_rank": 13}),
    "deepseek_v3 one group": (  # the language model of DeepSeek-VL2, for which transformers has no class
        "DeepseekV3",
        {**MLA, **MIXTURE, **ROPE, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "routed_scaling_factor": 2.0},
    ),
    "deepseek_v3 plain yarn": (
        "DeepseekV3",
        {**MLA, **MIXTURE, "rope_parameters": YARN, **GROUPS, "q_lora_rank": 13},
    ),
    "deepseek_v32": (  # so many index heads that no score is 0: ties are broken otherwise there
        "DeepseekV32",
        {**MLA, **MIXTURE, "rope_parameters": SHARP, **GROUPS, "q_lora_rank": 13}
        | {"index_n_heads": 32, "index_head_dim": 10, "index_topk": 7},
    ),
    "glm_moe_dsa": (  # as many for the same reason
        "GlmMoeDsa",
        {**MLA, **MIXTURE, **ROPE, "q_lora_rank": 13, "index_n_heads": 32, "index_head_dim": 10, "index_topk": 7},
    ),
    "glm_moe_dsa reused": (
        "GlmMoeDsa",
        {**MLA, **MIXTURE, "rope_parameters": SHARP, **GROUPS, "q_lora_rank": 13, "index_n_heads": 32}
        | {"index_head_dim": 10, "index_topk": 7, "indexer_types": ["full", "shared", "full", "shared"]},
    ),
    "deepseek_v4": (  # as many index heads for the same reason
        "DeepseekV4",
        {"num_attention_heads": 6, "head_dim": 12, "qk_rope_head_dim": 4, "q_lora_rank": 13, "o_groups": 3}
        | {"o_lora_rank": 10, "sliding_window": 5, "index_n_heads": 32, "index_head_dim": 10, "index_topk": 2}
        | {"layer_types": [f"{kind}_attention" for kind in ("sliding", *COMPRESSED, COMPRESSED[0])]}
        | {"compress_rate_hca": 8, "num_hash_layers": 2, "hc_mult": 3, "swiglu_limit": 0.7}
        | {"moe_intermediate_size": 11, "n_routed_experts": 8, "num_experts_per_tok": 3, "rms_norm_eps": 1e-6}
        | {"rope_parameters": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}},
    ),
    "deepseek_v3 yarn": ("DeepseekV3", {**MLA, **MIXTURE, "rope_parameters": SHARP, **GROUPS, "q_lora_rank": 13}),
}
for compressed in (False, True):
    for yarn in (False, True):
        words = "deepseek_v2" + " q_lora" * compressed + " yarn" * yarn
        positions = {"rope_parameters": SHARP} if yarn else ROPE
        gate = {"topk_method": "group_limited_greedy", **GROUPS} if compressed else {"topk_method": "greedy"}
        CASES[words] = (
            "DeepseekV2",
            {**MLA, **MIXTURE, **positions, **gate, "q_lora_rank": 13 if compressed else None},
        )


CONFIGS = {"Inkling": "InklingTextConfig"}  # where the class is not named after the head


def build(name: str, dtype: torch.dtype) -> nn.Module:
    """The model of a case as transformers makes it, its weights not yet random."""
    architecture, settings = CASES[name]
    sizes = {} if architecture == "GPT2" else SIZES
    config = getattr(transformers, CONFIGS.get(architecture, f"{architecture}Config"))(
        **copy.deepcopy({**sizes, **settings})
    )  # it writes into them
    config._experts_implementation = "eager"  # the others refuse doubles
    head = "GPT2LMHeadModel" if architecture == "GPT2" else f"{architecture.removesuffix('Text')}ForCausalLM"
    return getattr(transformers, head)(config).to(dtype).eval()


# ---- where transformers saves other names than those of the released files, which it reads ---------------------------


def _olmo_hybrid(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = dict(tensors)
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        if layer + "post_feedforward_layernorm.weight" in tensors:
            found[layer + "post_attention_layernorm.weight"] = found.pop(layer + "feedforward_layer_norm.weight")
            continue
        widths = [len(tensors[f"{layer}linear_attn.{x}_proj.weight"]) for x in "qkv"]
        names = [f"{layer}linear_attn.{x}_conv1d.weight" for x in "qkv"]
        whole = torch.cat([tensors[name] for name in names])
        found |= dict(zip(names, (part.clone() for part in whole.split(widths)), strict=True))
    return found


def _kimi_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    dense = re.compile(r"block_sparse_moe\.(gate|up|down)_proj")
    return {dense.sub(r"mlp.\1_proj", name): tensor for name, tensor in tensors.items()}


def _longcat_flash(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the rows of experts that have no parameters."""
    idle = re.compile(r"mlp\.experts\.[567]\.")
    return {name: tensor for name, tensor in tensors.items() if not idle.search(name)}


RELEASED = {"olmo_hybrid": _olmo_hybrid, "kimi_linear": _kimi_linear, "longcat_flash": _longcat_flash}


def as_loaded(folder: Path, config: Any) -> None:
    """Add to a folder what transformers 5.24 wants to load and does not read: rows of experts without parameters."""
    if not (idle := getattr(config, "zero_expert_num", 0)):
        return
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    first = config.n_routed_experts
    for name in [name for name in tensors if re.search(r"mlp\.experts\.0\.(gate|up)_proj", name)]:
        tensors |= {
            name.replace("experts.0.", f"experts.{first + n}."): torch.zeros_like(tensors[name]) for n in range(idle)
        }
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def as_released(folder: Path, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite a folder in the names of the released files."""
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("model*"):
        if file.suffix == ".safetensors":
            tensors |= load_file(file)
        file.unlink()
    save_file(rename(tensors), folder / "model.safetensors", metadata={"format": "pt"})
