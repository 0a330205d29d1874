"""GGUF files, written as llama.cpp's converter writes them, give the logits of transformers' model they came from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from interop.gguf import FRAME, LAYER, STACKS, unpack
from interop.hf import main
from interop.source import load
from registry import ConfigError

gguf = pytest.importorskip("gguf", reason="needs blockwright[gguf]")
WORDS = [*"abcdefgh", "Ġ", "ab", "Ġa", "<|end|>", "<|tool|>"]
MERGES = ["a b", "Ġ a"]


def permuted(weight: Tensor, heads: int) -> Tensor:
    """``LlamaModel.permute`` of llama.cpp's convert_hf_to_gguf.py."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write(folder: Path, file: Path, split: bool = False, **changes: Any) -> Path:
    """A checkpoint of transformers as a GGUF file; ``split``: with the latent's keys and values apart by head."""
    config = json.loads((folder / "config.json").read_text())
    architecture = {"llama": "llama", "qwen2": "qwen2", "deepseek_v2": "deepseek2"}[config["model_type"]]
    writer = gguf.GGUFWriter(file, changes.pop("architecture", architecture))
    for key, value in {**metadata(config, architecture, split), **changes}.items():
        add(writer, key, value)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in named(tensors, config, split).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return file


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)


def metadata(config: dict[str, Any], architecture: str, split: bool) -> dict[str, Any]:
    rope = config["rope_parameters"]
    found = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "context_length": config["max_position_embeddings"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
    }
    if rope["rope_type"] == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    if architecture == "llama" and config.get("head_dim"):
        found["attention.key_length"] = config["head_dim"]
    if architecture == "deepseek2":
        found |= latent(config, split)
    tokens = {"model": "gpt2", "pre": "smollm", "tokens": WORDS, "merges": MERGES, "eos_token_id": 11}
    tokens["token_type"] = [*[1] * 11, 3, 4]
    found = {f"{architecture}.{key}": value for key, value in found.items()}
    return found | {f"tokenizer.ggml.{key}": value for key, value in tokens.items()}


def latent(config: dict[str, Any], split: bool) -> dict[str, Any]:
    width, rope = config["qk_nope_head_dim"] + config["qk_rope_head_dim"], config["qk_rope_head_dim"]
    lengths: dict[str, Any] = {"attention.key_length": width, "attention.value_length": config["v_head_dim"]}
    if split:
        lengths = {f"{key}_mla": value for key, value in lengths.items()}
        lengths |= {"attention.key_length": config["kv_lora_rank"] + rope, "attention.head_count_kv": 1}
        lengths["attention.value_length"] = config["kv_lora_rank"]
    optional = {"attention.q_lora_rank": config["q_lora_rank"]} if config["q_lora_rank"] else {}
    if config.get("n_group"):
        optional |= {"expert_group_count": config["n_group"], "expert_group_used_count": config["topk_group"]}
    return {
        **lengths,
        **optional,
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "rope.dimension_count": rope,
        "expert_count": config["n_routed_experts"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_used_count": config["num_experts_per_tok"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_weights_scale": float(config["routed_scaling_factor"]),
        "expert_weights_norm": bool(config["norm_topk_prob"]),
    }


def named(tensors: dict[str, Tensor], config: dict[str, Any], split: bool) -> dict[str, Tensor]:
    """By the names of llama.cpp, experts stacked."""
    theirs = {value: key for key, value in {**FRAME, **LAYER}.items()}
    found: dict[str, Tensor] = {}
    for name in sorted(tensors, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)]):
        place = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert place
        layer, stem, kind = place.groups()
        prefix, tensor = f"blk.{layer}." if layer else "", tensors[name]
        expert = re.fullmatch(r"mlp\.experts\.(\d+)\.(\w+)_proj", stem)
        if expert:
            stack = next(key for key, value in STACKS.items() if value.endswith(f"{expert[2]}_proj"))
            found.setdefault(f"{prefix}{stack}.{kind}", []).append(tensor)  # type: ignore[arg-type, attr-defined]
        elif stem == "self_attn.kv_b_proj" and split:
            heads = tensor.unflatten(0, (config["num_attention_heads"], -1))
            keys, values = heads.split((config["qk_nope_head_dim"], config["v_head_dim"]), 1)
            found |= {f"{prefix}attn_k_b.weight": keys.mT, f"{prefix}attn_v_b.weight": values}
        else:
            if config["model_type"] == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
                tensor = permuted(tensor, config[f"num_{'attention' if 'q_' in stem else 'key_value'}_heads"])
            found[f"{prefix}{theirs[stem]}.{kind}"] = tensor
    return {name: torch.stack(t) if isinstance(t, list) else t for name, t in found.items()}


CASES = [
    ("llama", False),
    ("llama tied biased", False),
    ("qwen2", False),
    ("deepseek_v2", False),
    ("deepseek_v2 q_lora yarn", True),
]


@pytest.mark.parametrize(("name", "split"), CASES)
@torch.no_grad()
def test_imported_logits_are_those_of_transformers(
    name: str,
    split: bool,
    foreign: Callable[..., nn.Module],
    checkpoint: Callable[..., Path],
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    file = write(checkpoint(name), tmp_path / "model.gguf", split)
    assert main(["import", str(file), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(load(tmp_path / "out")(tokens), foreign(name)(tokens).logits, rtol=0, atol=1e-5)
    assert not list(tmp_path.glob(".out*"))


def test_tokenizer_is_rebuilt_and_travels_along(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from training.data.tokenizers.pretrained import Pretrained

    file = write(checkpoint("llama"), tmp_path / "m.gguf", **{"tokenizer.chat_template": "{{ messages }}"})
    assert main(["import", str(file), str(tmp_path / "out")]) == 0
    words = Pretrained(str(tmp_path / "out" / "tokenizer.json"))
    assert words.encode("ab ab ac").tolist() == [9, 8, 9, 10, 2] and words.decode([9, 8, 9]) == "ab ab"
    assert words.special_words == {"<|end|>": 11} and words.eos == 11
    assert json.loads(words.companions["tokenizer_config.json"])["chat_template"] == "{{ messages }}"


def test_tokenizer_beside_the_file_is_taken(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = write(checkpoint("llama"), tmp_path / "m.gguf", **{"tokenizer.ggml.model": "llama"})
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be rebuilt.*tokenizer.json beside"):
        unpack(file, tmp_path / "out")
    (tmp_path / "tokenizer.json").write_text("{}")
    unpack(file, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "bert"}, "not a supported architecture"),
        ({"llama.rope.scaling.type": "longrope"}, "is not supported"),
    ],
)
def test_what_has_no_counterpart_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    file = write(checkpoint("llama"), tmp_path / "m.gguf", **changes)
    with pytest.raises(ConfigError, match=words):
        unpack(file, tmp_path)


def test_damaged_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF but not really")
    assert main(["import", str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 64
    assert "cannot be read as GGUF" in capsys.readouterr().err and not (tmp_path / "out").exists()
