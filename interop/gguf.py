"""GGUF files of llama.cpp as Hugging Face folders, which ``blockwright import FILE.gguf OUT`` then imports.

Architectures llama (Llama 1 to 3, Mistral, SmolLM), qwen2 and deepseek2. Quantised tensors become fp32, as llama.cpp
itself dequantises them. llama.cpp rotates neighbouring pairs, and permutes Llama's query and key rows for that; the
rows are put back here. DeepSeek's are not permuted. A newer deepseek2 file stores ``kv_b_proj`` as two tensors by head,
one of them transposed, which are joined again.

Tokenizers: byte-level BPE of the pre-tokenizers in ``PRE``; for any other, put the model's tokenizer.json beside the
file. Not supported: files in several parts, adapters, and rotary scalings other than linear and yarn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from interop.companions import SETTINGS
from interop.folder import dump_json
from interop.shards import Outgoing, write_shards
from registry import ConfigError, did_you_mean
from registry.extras import require
from registry.folder import MAX_FILE_BYTES, read_bytes

MAX_SHARD = 5 * 10**9
Get = Callable[..., Any]  # (key, default=) of the file's metadata

# Names without ``blk.{i}.`` and ``.weight`` → those of transformers.
FRAME = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")},
    **{f"ffn_{n}_shexp": f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")},
    "ffn_gate_inp": "mlp.gate",
}
STACKS = {f"ffn_{n}_exps": f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down")}
CHOICE_BIAS = {
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}

_DIGITS = {"type": "Digits", "individual_digits": True}
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, _byte_level(False)]


# Name in the file → the parts of the pre-tokenizer, as in the tokenizer.json of these models.
PRE: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "smollm": [_DIGITS, _byte_level(True)],
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_LLAMA3.replace("{1,3}", "")),
}
CONTROL, USER_DEFINED = 3, 4  # types of tokens


def unpack(file: Path, folder: Path) -> None:
    """Write a GGUF file as config.json, safetensors and tokenizer files.

    Args:
        file: a ``.gguf``
        folder: must exist, and be empty

    Raises:
        ConfigError: it cannot be read, or holds an architecture, tensor or setting without counterpart
    """
    require("gguf", "gguf", path="import", value=str(file))
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        architecture = fields["general.architecture"]
    except Exception as error:  # the reader raises several classes for a truncated or foreign file
        rule = f"cannot be read as GGUF ({error})"
        raise ConfigError(str(file), "…", rule, "Fetch it again; name the first of no parts") from None
    if architecture not in CONFIGS:
        rule = "is not a supported architecture"
        raise ConfigError(f"{file}: general.architecture", architecture, rule, did_you_mean(architecture, CONFIGS))

    def get(key: str, default: Any = ...) -> Any:
        found = fields.get(f"{architecture}.{key}", default)
        if found is ...:
            rule = "is missing"
            raise ConfigError(f"{file}: {architecture}.{key}", None, rule, "Convert the model again with llama.cpp")
        return found

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = CONFIGS[architecture](get, tensors) | _frame(get, tensors, fields)
    ready = {name: Outgoing(4 * n, make) for name, n, make in _converted(tensors, config, str(file))}
    write_shards(folder, ready, MAX_SHARD)
    dump_json(folder / "config.json", config)
    _write_tokenizer(fields, file, folder)


# ---- settings --------------------------------------------------------------------------------------------------------


def _frame(get: Get, tensors: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    ids = {name: fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return {
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "max_position_embeddings": get("context_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": get("attention.head_count"),
        "rms_norm_eps": round(get("attention.layer_norm_rms_epsilon"), 12),  # stored in fp32
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(get),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
        **{f"{name}_token_id": number for name, number in ids.items()},
    }


def _scaling(get: Get) -> dict[str, Any] | None:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ConfigError("rope.scaling.type", kind, "is not supported", "Use a file with linear or yarn")
    found = {"rope_type": kind, "factor": get("rope.scaling.factor")}
    if kind == "yarn":
        found["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
        if (sharpness := get("rope.scaling.yarn_log_multiplier", None)) is not None:
            found |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * sharpness, 6))  # stored as a tenth
    return found


def _llama(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_freqs.weight" in tensors:
        rule = "holds Llama 3's rotary factors instead of the settings they come from"
        raise ConfigError("rope_freqs.weight", "…", rule, "Import the published safetensors")
    width = get("attention.key_length", get("embedding_length") // get("attention.head_count"))
    biased = "blk.0.attn_output.bias" in tensors
    heads = {"num_key_value_heads": _kv_heads(get), "head_dim": width}
    return {"model_type": "llama", **heads, "attention_bias": biased}


def _qwen2(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {"model_type": "qwen2", "num_key_value_heads": _kv_heads(get)}


def _kv_heads(get: Get) -> int:
    return get("attention.head_count_kv", get("attention.head_count"))


def _deepseek2(get: Get, tensors: Mapping[str, Any]) -> dict[str, Any]:
    rope = get("rope.dimension_count")
    sigmoid = any("exp_probs_b" in name for name in tensors)
    groups = get("expert_group_count", 1)
    method = "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy"
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "q_lora_rank": get("attention.q_lora_rank", None),
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_nope_head_dim": get("attention.key_length_mla", get("attention.key_length")) - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": get("attention.value_length_mla", get("attention.value_length")),
        "n_routed_experts": get("expert_count"),
        "n_shared_experts": get("expert_shared_count", 0),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "first_k_dense_replace": get("leading_dense_block_count", 0),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
        "norm_topk_prob": get("expert_weights_norm", False),
        "n_group": groups,
        "topk_group": get("expert_group_used_count", 1),
        "topk_method": method,
        "scoring_func": "sigmoid" if sigmoid else "softmax",
    }


CONFIGS: dict[str, Callable[[Get, Mapping[str, Any]], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "deepseek2": _deepseek2,
}

# ---- tensors ---------------------------------------------------------------------------------------------------------


def _converted(
    tensors: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """(name of transformers, numbers in it, how to make it) of every tensor."""
    for name, tensor in tensors.items():
        prefix, leaf = _place(name)
        stem, _, kind = leaf.rpartition(".")
        n = int(tensor.n_elements)
        if leaf in CHOICE_BIAS:
            yield prefix + CHOICE_BIAS[leaf], n, _reader(tensor)
        elif stem in STACKS:
            experts = int(tensor.shape[-1])
            for e in range(experts):
                yield prefix + STACKS[stem].format(e=e) + f".{kind}", n // experts, _reader(tensor, e)
        elif stem == "attn_k_b":
            values = tensors[name.replace("attn_k_b", "attn_v_b")]
            yield f"{prefix}self_attn.kv_b_proj.{kind}", n + int(values.n_elements), _joined(tensor, values)
        elif stem in ("attn_q", "attn_k") and config["model_type"] == "llama":
            heads = config["num_attention_heads" if stem == "attn_q" else "num_key_value_heads"]
            yield f"{prefix}{LAYER[stem]}.{kind}", n, _unpermuted(tensor, heads)
        elif stem in (LAYER if prefix else FRAME):
            yield f"{prefix}{(LAYER if prefix else FRAME)[stem]}.{kind}", n, _reader(tensor)
        elif stem != "attn_v_b":
            rule = f"is not a tensor of {config['model_type']} as llama.cpp writes it"
            raise ConfigError(where, name, rule, "Import the published safetensors")


def _place(name: str) -> tuple[str, str]:
    """``blk.3.attn_q.weight`` → (``model.layers.3.``, ``attn_q.weight``)."""
    if not name.startswith("blk."):
        return "", name
    _, layer, leaf = name.split(".", 2)
    return f"model.layers.{layer}.", leaf


def _read(tensor: Any) -> Tensor:
    """In fp32, with the shape that torch gives it."""
    from gguf import dequantize

    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()


def _reader(tensor: Any, expert: int | None = None) -> Callable[[], Tensor]:
    return lambda: _read(tensor) if expert is None else _read(tensor)[expert].clone()


def _unpermuted(tensor: Any, heads: int) -> Callable[[], Tensor]:
    """Rows of neighbouring pairs → the two halves of each head."""
    return lambda: _read(tensor).unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _joined(keys: Any, values: Any) -> Callable[[], Tensor]:
    """Keys [N,C,nope] and values [N,V,C] of each head → [N·(nope+V),C]."""
    return lambda: torch.cat((_read(keys).mT, _read(values)), 1).flatten(0, 1).contiguous()


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def _write_tokenizer(fields: Mapping[str, Any], file: Path, folder: Path) -> None:
    beside = file.with_name("tokenizer.json")
    if beside.is_file():
        (folder / beside.name).write_bytes(read_bytes(beside.parent, beside.name, MAX_FILE_BYTES))
    else:
        dump_json(folder / beside.name, _engine(fields, str(file)))
    words = fields["tokenizer.ggml.tokens"]
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {ours: fields.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in named.items()}
    settings = {f"{name}_token": words[number] for name, number in ids.items() if number is not None}
    template = fields.get("tokenizer.chat_template")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    dump_json(folder / SETTINGS, settings | ({} if template is None else {"chat_template": template}))


def _engine(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or pre not in PRE:
        rule = f"is a tokenizer ({kind}) that cannot be rebuilt; known are {', '.join(PRE)}"
        raise ConfigError(f"{where}: tokenizer.ggml.pre", pre, rule, "Put the model's tokenizer.json beside the file")
    words, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": word, **flags, "special": kind == CONTROL}
        for i, (word, kind) in enumerate(zip(words, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    merges = [merge.split(" ", 1) for merge in fields["tokenizer.ggml.merges"]]
    model = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": merges}
    parts = PRE[pre]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": parts},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": model,
    }
