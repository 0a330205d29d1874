"""GGUF files of llama.cpp as Hugging Face folders, which ``blockwright import FILE.gguf OUT`` then imports.

Architectures llama (Llama 1 to 3, Mistral, SmolLM), qwen2 and deepseek2. Quantised tensors become fp32, as llama.cpp
itself dequantises them. llama.cpp rotates neighbouring pairs, and permutes Llama's query and key rows for that; the
rows are put back here. DeepSeek's are not permuted. A newer deepseek2 file stores ``kv_b_proj`` as two tensors by head,
one of them transposed, which are joined again.

Tokenizers: byte-level BPE of the pre-tokenizers in ``PRE``; for any other, put the model's tokenizer.json beside the
file. Every key of the metadata is read, listed as idle in plugins/hub/gguf_metadata.py, or refused.
Not supported: files in several parts, adapters, and rotary scalings other than linear and yarn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from blockwright.blocks.checkpoint.manifest import dump_json
from blockwright.blocks.checkpoint.shards import Outgoing, write_shards
from blockwright.plugins.hub.gguf_metadata import REMEDY, Metadata
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.errors import require
from blockwright.registry.folder import MAX_FILE_BYTES, read_bytes
from blockwright.registry.ranges import Positive
from blockwright.training.data.tokenizers.companions import SETTINGS

Size = Annotated[int, Ge(1), Le(2**31)]
Index = Annotated[int, Ge(0), Le(2**31)]
MAX_SHARD = 5 * 10**9

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
    require("hub", "gguf", path="import", value=str(file))
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the reader raises several classes for a truncated or foreign file
        rule = f"cannot be read as GGUF ({error})"
        raise ConfigError(str(file), "…", rule, "Fetch it again; name the first of no parts") from None
    read = Metadata(fields, str(file))
    if read.architecture not in CONFIGS:
        remedy = did_you_mean(read.architecture, CONFIGS)
        raise read.refuse("general.architecture", read.architecture, "is not a supported architecture", remedy)
    if (parts := read.take("split.count", Index, 1)) > 1:
        raise read.refuse("split.count", parts, "is one of several parts", "Join them with llama-gguf-split --merge")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _frame(read, tensors)
    config |= CONFIGS[read.architecture](read, tensors, config)
    _write_tokenizer(read, config, file, folder)
    read.refuse_unread()
    ready = {name: Outgoing(4 * n, make) for name, n, make in _converted(tensors, config, str(file))}
    write_shards(folder, ready, MAX_SHARD)
    dump_json(folder / "config.json", config)


# ---- settings --------------------------------------------------------------------------------------------------------


def _frame(read: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ConfigError(f"{read.where}: token_embd.weight", None, "must be a matrix of the file", REMEDY)
    rows, own = int(embedding.shape[1]), read.own
    if read.take(own("vocab_size"), Index, rows) != rows:
        raise read.refuse(own("vocab_size"), read.fields[own("vocab_size")], f"the embedding has {rows} rows")
    ids = {
        name: read.take(f"tokenizer.ggml.{name}_token_id", Annotated[int, Ge(0), Le(rows - 1)], None)
        for name in ("bos", "eos")
    }
    return {
        "vocab_size": rows,
        "hidden_size": read.take(own("embedding_length"), Size),
        "num_hidden_layers": read.take(own("block_count"), Size),
        "max_position_embeddings": read.take(own("context_length"), Size),
        "intermediate_size": read.take(own("feed_forward_length"), Size),
        "num_attention_heads": read.take(own("attention.head_count"), Size),
        "rms_norm_eps": round(read.take(own("attention.layer_norm_rms_epsilon"), Positive), 12),  # stored in fp32
        "rope_theta": read.take(own("rope.freq_base"), Positive, 10000.0),
        "rope_scaling": _scaling(read),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": "float32",
        **{f"{name}_token_id": number for name, number in ids.items()},
    }


def _scaling(read: Metadata) -> dict[str, Any] | None:
    scaling = read.own("rope.scaling")
    kind = read.take(f"{scaling}.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise read.refuse(f"{scaling}.type", kind, "is not supported", "Use a file with linear or yarn")
    found = {"rope_type": kind, "factor": read.take(f"{scaling}.factor", Positive)}
    original = read.take(f"{scaling}.original_context_length", Size, ... if kind == "yarn" else None)
    if kind == "yarn":
        found["original_max_position_embeddings"] = original
        if sharpness := read.take(f"{scaling}.yarn_log_multiplier", Annotated[float, Gt(-1)], 0.0):
            found |= dict.fromkeys(("mscale", "mscale_all_dim"), round(10 * sharpness, 6))  # stored as a tenth
        betas = {n: read.take(f"{scaling}.yarn_{n}", Positive, None) for n in ("beta_fast", "beta_slow")}
        found |= {name: value for name, value in betas.items() if value is not None}
    return found


def _llama(read: Metadata, tensors: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    if "rope_freqs.weight" in tensors:
        rule = "holds Llama 3's rotary factors instead of the settings they come from"
        raise ConfigError(f"{read.where}: rope_freqs.weight", "…", rule, "Import the published safetensors")
    width = _head_width(read, frame, read.take(read.own("attention.key_length"), Size, None))
    biased = "blk.0.attn_output.bias" in tensors
    heads = {"num_key_value_heads": _kv_heads(read, frame), "head_dim": width}
    return {"model_type": "llama", **heads, "attention_bias": biased}


def _qwen2(read: Metadata, tensors: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    plain = frame["hidden_size"] // frame["num_attention_heads"]
    if (width := _head_width(read, frame, read.take(read.own("attention.key_length"), Size, None))) != plain:
        raise read.refuse(read.own("attention.key_length"), width, f"heads of Qwen 2 are {plain} wide here")
    return {"model_type": "qwen2", "num_key_value_heads": _kv_heads(read, frame)}


def _kv_heads(read: Metadata, frame: Mapping[str, Any]) -> int:
    return read.take(read.own("attention.head_count_kv"), Size, frame["num_attention_heads"])


def _head_width(read: Metadata, frame: Mapping[str, Any], given: int | None) -> int:
    """The width of a head, which is that of its values and of its rotation too."""
    width: int = given or frame["hidden_size"] // frame["num_attention_heads"]
    for key in ("attention.value_length", "rope.dimension_count"):
        if (other := read.take(read.own(key), Index, width)) != width:
            raise read.refuse(read.own(key), other, f"must be the width of a head, {width}")
    return width


def _deepseek2(read: Metadata, tensors: Mapping[str, Any], frame: Mapping[str, Any]) -> dict[str, Any]:
    own = read.own
    rope, heads = read.take(own("rope.dimension_count"), Size), frame["num_attention_heads"]
    if (kv := read.take(own("attention.head_count_kv"), Index, heads)) not in (
        1,
        heads,
    ):  # 1: keys and values by the latent
        raise read.refuse(own("attention.head_count_kv"), kv, f"must be 1 or {heads}")
    key, value = (read.take(own(f"attention.{name}_length"), Size) for name in ("key", "value"))
    width = read.take(own("attention.key_length_mla"), Size, key)
    if width <= rope:
        raise read.refuse(own("attention.key_length"), width, f"must be larger than the rotated width, {rope}")
    return {
        "q_lora_rank": read.take(own("attention.q_lora_rank"), Size, None),
        "kv_lora_rank": read.take(own("attention.kv_lora_rank"), Size),
        "qk_nope_head_dim": width - rope,
        "qk_rope_head_dim": rope,
        "v_head_dim": read.take(own("attention.value_length_mla"), Size, value),
        "n_routed_experts": read.take(own("expert_count"), Size),
        "n_shared_experts": read.take(own("expert_shared_count"), Index, 0),
        "num_experts_per_tok": read.take(own("expert_used_count"), Size),
        "moe_intermediate_size": read.take(own("expert_feed_forward_length"), Size),
        "first_k_dense_replace": read.take(own("leading_dense_block_count"), Index, 0),
        "routed_scaling_factor": read.take(own("expert_weights_scale"), Positive, 1.0),
        "norm_topk_prob": read.take(own("expert_weights_norm"), bool, False),
        **_groups(read, any("exp_probs_b" in name for name in tensors)),
    }


def _groups(read: Metadata, biased: bool) -> dict[str, Any]:
    """How experts are chosen. A file of an older converter does not say in how many groups, and is refused: with one
    group, a model that has several would choose other experts."""
    sigmoid = read.take(read.own("expert_gating_func"), Index, 2 if biased else 1) == 2
    if sigmoid != biased or read.fields.get(read.own("expert_gating_func"), 1) not in (1, 2):
        rule = "must be 2 (sigmoid) with biases of the choice, and 1 (softmax) without"
        raise read.refuse(read.own("expert_gating_func"), read.fields[read.own("expert_gating_func")], rule)
    groups = read.take(read.own("expert_group_count"), Size)
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "n_group": groups,
        "topk_group": read.take(read.own("expert_group_used_count"), Size, 1 if groups == 1 else ...),
        "topk_method": "noaux_tc" if sigmoid else "group_limited_greedy" if groups > 1 else "greedy",
        "scoring_func": "sigmoid" if sigmoid else "softmax",
    }


CONFIGS: dict[str, Callable[[Metadata, Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
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
        prefix, leaf = _place(name, where)
        stem, _, kind = leaf.rpartition(".")
        n = int(tensor.n_elements)
        if leaf in CHOICE_BIAS:
            yield prefix + CHOICE_BIAS[leaf], n, partial(_read, tensor, where)
        elif stem in STACKS:
            experts = int(tensor.shape[-1])
            for e in range(experts):
                yield prefix + STACKS[stem].format(e=e) + f".{kind}", n // experts, partial(_read, tensor, where, e)
        elif stem == "attn_k_b":
            other = name.replace("attn_k_b", "attn_v_b")
            shapes = [[] if t is None else [int(size) for size in t.shape] for t in (tensor, tensors.get(other))]
            # As stored: [nope,C,N] and [C,V,N].
            if [len(shape) for shape in shapes] != [3, 3] or shapes[0][1:] != [shapes[1][0], shapes[1][2]]:
                rule = f"must stand beside attn_k_b of {shapes[0]}, with as many heads and the latent's width"
                raise ConfigError(f"{where}: {other}", shapes[1] or None, rule, REMEDY)
            values = tensors[other]
            yield f"{prefix}self_attn.kv_b_proj.{kind}", n + int(values.n_elements), _joined(tensor, values, where)
        elif stem in ("attn_q", "attn_k") and config["model_type"] == "llama":
            heads = config["num_attention_heads" if stem == "attn_q" else "num_key_value_heads"]
            if int(tensor.shape[-1]) % (2 * heads):
                rule = f"must have rows for {heads} heads of an even width"
                raise ConfigError(f"{where}: {name}", [int(size) for size in tensor.shape], rule, REMEDY)
            yield f"{prefix}{LAYER[stem]}.{kind}", n, _unpermuted(tensor, heads, where)
        elif stem in (LAYER if prefix else FRAME):
            yield f"{prefix}{(LAYER if prefix else FRAME)[stem]}.{kind}", n, partial(_read, tensor, where)
        elif stem != "attn_v_b":
            rule = f"is not a tensor of {config['model_type']} as llama.cpp writes it"
            raise ConfigError(where, name, rule, "Import the published safetensors")


def _place(name: str, where: str) -> tuple[str, str]:
    """``blk.3.attn_q.weight`` → (``model.layers.3.``, ``attn_q.weight``)."""
    if not name.startswith("blk."):
        return "", name
    found = re.fullmatch(r"blk\.(\d{1,6})\.(.+)", name)
    if found is None:
        raise ConfigError(where, name, "must be blk.LAYER.NAME", REMEDY)
    return f"model.layers.{int(found[1])}.", found[2]


def _read(tensor: Any, where: str, expert: int | None = None) -> Tensor:
    """In fp32, with the shape that torch gives it; of a stack, one expert alone is dequantised."""
    from gguf import dequantize

    data = tensor.data if expert is None else tensor.data[expert]
    try:
        return torch.from_numpy(dequantize(data, tensor.tensor_type).copy()).float()
    except Exception as error:  # gguf raises several classes
        rule = f"cannot be dequantised from {tensor.tensor_type.name} ({error})"
        raise ConfigError(f"{where}: {tensor.name}", tensor.tensor_type.name, rule, REMEDY) from None


def _unpermuted(tensor: Any, heads: int, where: str) -> Callable[[], Tensor]:
    """Rows of neighbouring pairs → the two halves of each head."""
    return lambda: _read(tensor, where).unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()


def _joined(keys: Any, values: Any, where: str) -> Callable[[], Tensor]:
    """Keys [N,C,nope] and values [N,V,C] of each head → [N·(nope+V),C]."""
    return lambda: torch.cat((_read(keys, where).mT, _read(values, where)), 1).flatten(0, 1).contiguous()


# ---- tokenizer -------------------------------------------------------------------------------------------------------


def _write_tokenizer(read: Metadata, config: Mapping[str, Any], file: Path, folder: Path) -> None:
    beside, rows = file.with_name("tokenizer.json"), config["vocab_size"]
    engine = _engine(read, rows, beside.is_file())
    if engine is None:
        (folder / beside.name).write_bytes(read_bytes(beside.parent, beside.name, MAX_FILE_BYTES))
    else:
        dump_json(folder / beside.name, engine)
    words = read.texts("tokenizer.ggml.tokens")
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot"}
    most = len(words) - 1
    ids = {
        n: read.take(f"tokenizer.ggml.{theirs}_token_id", Annotated[int, Ge(0), Le(most)], None)
        for n, theirs in named.items()
    }
    settings: dict[str, Any] = {f"{name}_token": words[number] for name, number in ids.items() if number is not None}
    for name in ("add_bos_token", "add_eos_token"):
        if (added := read.take(f"tokenizer.ggml.{name}", bool, None)) is not None:
            settings[name] = added
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if (template := read.take("tokenizer.chat_template", str, None)) is not None:
        settings["chat_template"] = template
    dump_json(folder / SETTINGS, settings)


def _engine(read: Metadata, rows: int, replaced: bool) -> dict[str, Any] | None:
    """The contents of tokenizer.json; None where a file beside replaces it."""
    ggml = "tokenizer.ggml"
    kind, pre = read.take(f"{ggml}.model", str, None), read.take(f"{ggml}.pre", str, "gpt-2")
    words = read.texts(f"{ggml}.tokens")
    if replaced:
        read.taken |= {f"{ggml}.token_type", f"{ggml}.merges"}
        return None
    if kind != "gpt2" or pre not in PRE:
        rule = f"is a tokenizer ({kind}) that cannot be rebuilt; known are {', '.join(PRE)}"
        raise read.refuse(f"{ggml}.pre", pre, rule, "Put the model's tokenizer.json beside the file")
    if len(words) > rows or len(set(words)) < len(words):
        raise read.refuse(f"{ggml}.tokens", len(words), f"must be at most {rows} tokens, each once")
    types = read.wholes(f"{ggml}.token_type", len(words))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": word, **flags, "special": kind == CONTROL}
        for i, (word, kind) in enumerate(zip(words, types, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    merges = [merge.split(" ", 1) for merge in read.texts(f"{ggml}.merges")]
    known = set(words)
    if bad := [pair for pair in merges if len(pair) != 2 or not known.issuperset((*pair, "".join(pair)))]:
        raise read.refuse(f"{ggml}.merges", " ".join(bad[0]), "must join two tokens to a third")
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
