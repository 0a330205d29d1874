"""GGUF files, written as llama.cpp's converter writes them, give the logits of transformers' model they came from."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from foreign_models import V
from safetensors.torch import load_file
from torch import Tensor

from blockwright.blocks.checkpoint.source import load
from blockwright.plugins.hub import hf_import
from blockwright.plugins.hub.gguf import FRAME, LAYER, STACKS, _deepseek2, _frame, _write_tokenizer, unpack
from blockwright.plugins.hub.gguf_metadata import Metadata
from blockwright.registry import ConfigError
from blockwright.training.data.tokenizers.pretrained import Pretrained

gguf = pytest.importorskip("gguf", reason="needs blockwright[hub]")
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
    change = changes.pop("change", lambda tensors: None)
    for key, value in {**metadata(config, architecture, split), **changes}.items():
        number = "int32" if isinstance(value, int) and value < 0 else "uint32"
        kinds = {bool: "bool", int: number, float: "float32", str: "string", list: "array"}
        if value is not None:
            getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    tensors = named(load_file(folder / "model.safetensors"), config, split)
    change(tensors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return file


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
    optional |= {"expert_group_count": config.get("n_group") or 1}
    optional |= {"expert_group_used_count": config.get("topk_group") or 1}
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


CASES = [("llama tied biased", False), ("qwen2", False), ("deepseek_v2 q_lora yarn", True)]


@pytest.fixture(scope="module")
def bases(checkpoint: Callable[..., Path]) -> dict[str, Path]:
    """Checkpoints that tests only read."""
    return {name: checkpoint(name) for name in ("llama", "qwen2", "deepseek_v2", "deepseek_v2 q_lora yarn")}


@pytest.mark.parametrize(("name", "split"), CASES)
@torch.no_grad()
def test_imported_logits_are_those_of_transformers(
    name: str, split: bool, foreign: Any, checkpoint: Callable[..., Path], tokens: Tensor, tmp_path: Path
) -> None:
    file = write(checkpoint(name), tmp_path / "model.gguf", split)
    assert hf_import.main([str(file), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(load(tmp_path / "out")(tokens), foreign(name)(tokens).logits, rtol=0, atol=1e-5)
    assert not list(tmp_path.glob(".out*"))


def test_tokenizer_is_rebuilt_and_travels_along_or_is_the_one_beside_the_file(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    file = write(bases["llama"], tmp_path / "m.gguf", **{"tokenizer.chat_template": "{{ messages }}"})
    assert hf_import.main([str(file), str(tmp_path / "out")]) == 0
    words = Pretrained(str(tmp_path / "out" / "tokenizer.json"))
    assert words.encode("ab ab ac").tolist() == [9, 8, 9, 10, 2] and words.decode([9, 8, 9]) == "ab ab"
    assert words.special_words == {"<|end|>": 11} and words.eos == 11
    assert json.loads(words.companions["tokenizer_config.json"])["chat_template"] == "{{ messages }}"
    file = write(bases["llama"], tmp_path / "m.gguf", **{"tokenizer.ggml.model": "llama"})  # is not rebuilt
    (tmp_path / "beside").mkdir()
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        unpack(file, tmp_path / "beside")
    (tmp_path / "tokenizer.json").write_text("{}")
    unpack(file, tmp_path / "beside")
    assert (tmp_path / "beside" / "tokenizer.json").read_text() == "{}"


# Of a sound file of Llama, a key → values that cannot be obeyed.
WRONG: dict[str, Any] = {"architecture": "bert", "split.count": 3, "adapter.type": "lora", "llama.block_count": -1}
WRONG |= {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.attn_factor": 0.9, "llama.rope.freq_base": -1.0}
WRONG |= {"llama.rope.dimension_count": 4, "llama.attention.value_length": 4, "llama.attention.sliding_window": 16}
WRONG |= {"llama.attention.head_count": 0, "llama.attention.head_count_kv": [2, 2], "llama.something_new": 1.5}
WRONG |= {"llama.attention.layer_norm_rms_epsilon": "small", "llama.attention.layer_norm_epsilon": 1e-5}
WRONG |= {"llama.embedding_length": "wide", "llama.vocab_size": 7, "llama.expert_count": 8}
WRONG |= {"tokenizer.ggml.eos_token_id": 99, "tokenizer.ggml.bos_token_id": -1, "tokenizer.ggml.tokens": ["a", "a"]}
WRONG |= {"tokenizer.ggml.token_type": [1], "tokenizer.ggml.merges": ["ab"], "tokenizer.ggml.pre": 3}
WRONG |= {"tokenizer.ggml.normalizer": "nfc", "tokenizer.chat_template": 5}
IDLE: list[dict[str, Any]] = [  # llama-gguf-split --merge leaves the first
    {"split.no": 0, "split.count": 0, "split.tensors.count": 12},
    {"llama.expert_count": 0, "llama.expert_used_count": 0},
]


def test_metadata_that_cannot_be_obeyed_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    lengths = ("qwen2.attention.key_length", "qwen2.attention.value_length", "qwen2.rope.dimension_count")
    rows: list[tuple[str, str, dict[str, Any]]] = [("llama", key, {key: value}) for key, value in WRONG.items()]
    rows.append(("qwen2", lengths[0], dict.fromkeys(lengths, 2)))
    groups = "deepseek2.expert_group_count"
    rows.append(("deepseek_v2", groups, {groups: None}))
    for base, key, given in rows:
        file = write(bases[base], tmp_path / "m.gguf", **given)
        (tmp_path / key).mkdir()
        with pytest.raises(ConfigError) as found:
            unpack(file, tmp_path / key)
        assert key in str(found.value.path) and found.value.remedy
    for given in IDLE:
        (tmp_path / "out").mkdir(exist_ok=True)
        unpack(write(bases["llama"], tmp_path / "m.gguf", **given), tmp_path / "out")
        assert (tmp_path / "out" / "config.json").is_file()


def test_every_key_of_a_sound_file_is_read_and_typed(bases: dict[str, Path], tmp_path: Path) -> None:
    """Each key in turn missing, and of each other type: read otherwise, or one message."""
    values: list[Any] = [-1, 0, 2**31 - 1, 0.5, math.nan, "x", True, ["x"], [1]]
    config = json.loads((bases["deepseek_v2 q_lora yarn"] / "config.json").read_text())
    fields = {**metadata(config, "deepseek2", True), "general.architecture": "deepseek2"}
    tensors = {"token_embd.weight": SimpleNamespace(shape=[32, V])}
    refused = 0
    for key in fields:
        for changed in ({k: v for k, v in fields.items() if k != key}, *({**fields, key: value} for value in values)):
            try:
                read = Metadata(changed, "m.gguf")
                frame = _frame(read, tensors)
                _deepseek2(read, tensors, frame)
                _write_tokenizer(read, frame, tmp_path / "m.gguf", tmp_path)
                read.refuse_unread()
            except ConfigError as error:
                assert error.remedy
                refused += 1
    assert refused > 5 * len(fields)


def test_file_cut_or_changed_anywhere_gives_one_message(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Header, metadata and descriptions of tensors; what changes numbers alone is imported."""
    whole = write(bases["llama"], tmp_path / "whole.gguf").read_bytes()
    head, draw, codes = whole.index(b"output_norm") + 40, random.Random(0), set()
    places = [draw.randrange(head) for _ in range(40)]
    damaged = [b"GGUF but not really", *(whole[:at] for at in places[:15])]
    damaged += [whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :] for at in places[15:]]
    for number, content in enumerate(damaged):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content)
        codes.add(hf_import.main([str(file), str(tmp_path / str(number))]))
        assert number or (codes == {64} and not (tmp_path / "0").exists())
    assert codes <= {0, 64} and "Traceback" not in capsys.readouterr().err


VALUES = "blk.0.attn_v_b.weight"
DAMAGED: list[tuple[str, Callable[[Any], Any]]] = [  # a tensor of Llama → what becomes of it; None: it is gone
    *((name, lambda t: None) for name in ("token_embd.weight", "output_norm.weight")),
    ("blk.0", lambda t: torch.ones(2)),
    ("blk.x.attn_q.weight", lambda t: torch.ones(2, 2)),
    ("blk.0.attn_q.weight", lambda t: torch.ones(3, 2)),
    ("blk.0.ffn_down.weight", lambda t: torch.ones(2, 2)),
    ("blk.9.attn_q.weight", lambda t: torch.ones(16, 2)),
    *((f"blk.0.{name}.weight", lambda t: torch.ones(2, 2, 2)) for name in ("attn_k_b", "ffn_up_exps")),
    (VALUES, lambda t: t[:-1]),  # of a latent, beside its keys
    (VALUES, lambda t: t[:, :, :-1]),
    (VALUES, lambda t: t[0]),
    (VALUES, lambda t: None),
]


def test_tensor_that_is_missing_or_of_another_shape_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    for name, spoil in DAMAGED:

        def change(tensors: dict[str, Any], name: str = name, spoil: Callable[[Any], Any] = spoil) -> None:
            if (left := spoil(tensors.pop(name, None))) is not None:
                tensors[name] = left

        base = "deepseek_v2 q_lora yarn" if name == VALUES else "llama"
        file = write(bases[base], tmp_path / "m.gguf", split=name == VALUES, change=change)
        assert hf_import.main([str(file), str(tmp_path / "out")]) == 64, name
        assert not (tmp_path / "out").exists()


def test_stack_of_experts_is_dequantised_once(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, sizes, whole = write(bases["deepseek_v2"], tmp_path / "m.gguf"), [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: sizes.append(data.size) or whole(data, kind))
    (tmp_path / "out").mkdir()
    unpack(file, tmp_path / "out")
    assert sum(sizes) == sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors)
