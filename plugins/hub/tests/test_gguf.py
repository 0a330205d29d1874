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
from torch import Tensor, nn

from blockwright.blocks.checkpoint.source import load
from blockwright.plugins.hub import hf_import
from blockwright.plugins.hub.gguf import FRAME, LAYER, STACKS, _deepseek2, _frame, _write_tokenizer, unpack
from blockwright.plugins.hub.gguf_metadata import Metadata
from blockwright.registry import ConfigError

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
        if value is not None:
            add(writer, key, value)
    tensors = load_file(folder / "model.safetensors")
    tensors = named(tensors, config, split)
    change(tensors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    return file


def add(writer: Any, key: str, value: Any) -> None:
    kinds = {
        bool: "bool",
        int: "int32" if isinstance(value, int) and value < 0 else "uint32",
        float: "float32",
        str: "string",
        list: "array",
    }
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


CASES = [
    ("llama tied biased", False),
    ("qwen2", False),
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
    assert hf_import.main([str(file), str(tmp_path / "out")]) == 0
    torch.testing.assert_close(load(tmp_path / "out")(tokens), foreign(name)(tokens).logits, rtol=0, atol=1e-5)
    assert not list(tmp_path.glob(".out*"))


def test_tokenizer_is_rebuilt_and_travels_along(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from blockwright.training.data.tokenizers.pretrained import Pretrained

    file = write(checkpoint("llama"), tmp_path / "m.gguf", **{"tokenizer.chat_template": "{{ messages }}"})
    assert hf_import.main([str(file), str(tmp_path / "out")]) == 0
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


# Key of a file → a value that cannot be obeyed. Each replaces or is added to what a sound file has.
WRONG: dict[str, Any] = {
    "architecture": "bert",
    "split.count": 3,
    "adapter.type": "lora",
    "llama.rope.scaling.type": "longrope",
    "llama.rope.scaling.attn_factor": 0.9,
    "llama.rope.dimension_count": 4,
    "llama.attention.value_length": 4,
    "llama.attention.sliding_window": 16,
    "llama.attention.head_count": 0,
    "llama.attention.head_count_kv": [2, 2],
    "llama.attention.layer_norm_rms_epsilon": "small",
    "llama.attention.layer_norm_epsilon": 1e-5,
    "llama.block_count": -1,
    "llama.embedding_length": "wide",
    "llama.vocab_size": 7,
    "llama.expert_count": 8,
    "llama.rope.freq_base": -1.0,
    "llama.something_new": 1.5,
    "tokenizer.ggml.eos_token_id": 99,
    "tokenizer.ggml.bos_token_id": -1,
    "tokenizer.ggml.tokens": ["a", "a"],
    "tokenizer.ggml.token_type": [1],
    "tokenizer.ggml.merges": ["ab"],
    "tokenizer.ggml.pre": 3,
    "tokenizer.ggml.normalizer": "nfc",
    "tokenizer.chat_template": 5,
}


def test_metadata_that_cannot_be_obeyed_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama")
    for key, value in WRONG.items():
        file = write(folder, tmp_path / "m.gguf", **{key: value})
        out = tmp_path / key
        out.mkdir()
        with pytest.raises(ConfigError) as found:
            unpack(file, out)
        assert key in str(found.value.path) and found.value.remedy


@pytest.mark.parametrize(
    "extra",
    [
        {"split.no": 0, "split.count": 0, "split.tensors.count": 12},  # llama-gguf-split --merge leaves them
        {"llama.expert_count": 0, "llama.expert_used_count": 0},
    ],
)
def test_metadata_without_an_effect_is_passed(
    checkpoint: Callable[..., Path], tmp_path: Path, extra: dict[str, Any]
) -> None:
    file = write(checkpoint("llama"), tmp_path / "m.gguf", **extra)
    (tmp_path / "out").mkdir()
    unpack(file, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_refusal_of_a_key_shows_its_own_value(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    sizes = {f"qwen2.{key}": 2 for key in ("attention.key_length", "attention.value_length", "rope.dimension_count")}
    file = write(checkpoint("qwen2"), tmp_path / "m.gguf", **sizes)
    with pytest.raises(ConfigError, match="heads of Qwen 2") as found:
        unpack(file, tmp_path)
    assert found.value.value == 2 and found.value.path.endswith("qwen2.attention.key_length")


def test_keys_and_values_of_a_latent_that_do_not_fit_are_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    name, folder = "blk.0.attn_v_b.weight", checkpoint("deepseek_v2 q_lora yarn")
    for cut in (lambda t: t[:-1], lambda t: t[:, :, :-1], lambda t: t[0], lambda t: None):

        def change(tensors: dict[str, Any], cut: Callable[[Tensor], Tensor | None] = cut) -> None:
            if (left := cut(tensors.pop(name))) is not None:
                tensors[name] = left

        file = write(folder, tmp_path / "m.gguf", split=True, change=change)
        with pytest.raises(ConfigError, match="must stand beside attn_k_b"):
            unpack(file, tmp_path)


def test_every_key_of_a_sound_file_is_read_and_typed(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Each key in turn missing, and of each other type: read otherwise, or one message."""
    folder, values = checkpoint("deepseek_v2 q_lora yarn"), [-1, 0, 2**31 - 1, 0.5, math.nan, "x", True, ["x"], [1]]
    fields = {**metadata(json.loads((folder / "config.json").read_text()), "deepseek2", True)}
    fields["general.architecture"] = "deepseek2"
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
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Header, metadata and descriptions of tensors; what changes numbers alone is imported."""
    whole = write(checkpoint("llama"), tmp_path / "whole.gguf").read_bytes()
    head, draw, codes = whole.index(b"output_norm") + 40, random.Random(0), set()
    places = [draw.randrange(head) for _ in range(60)]
    damaged = [whole[:at] for at in places[:20]]
    damaged += [whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :] for at in places[20:]]
    for number, content in enumerate(damaged):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content)
        codes.add(hf_import.main([str(file), str(tmp_path / str(number))]))
    assert codes <= {0, 64} and "Traceback" not in capsys.readouterr().err


DAMAGED: dict[str, Callable[[dict[str, Any]], Any]] = {
    "token_embd.weight": lambda tensors: tensors.pop("token_embd.weight"),
    "blk.0": lambda tensors: tensors.update({"blk.0": torch.ones(2)}),
    "blk.x.attn_q.weight": lambda tensors: tensors.update({"blk.x.attn_q.weight": torch.ones(2, 2)}),
    "blk.0.attn_q.weight": lambda tensors: tensors.update({"blk.0.attn_q.weight": torch.ones(3, 2)}),
    "blk.0.attn_k_b.weight": lambda tensors: tensors.update({"blk.0.attn_k_b.weight": torch.ones(2, 2, 2)}),
    "output_norm.weight": lambda tensors: tensors.pop("output_norm.weight"),
    "blk.0.ffn_up_exps.weight": lambda tensors: tensors.update({"blk.0.ffn_up_exps.weight": torch.ones(2, 2, 2)}),
    "blk.0.ffn_down.weight": lambda tensors: tensors.update({"blk.0.ffn_down.weight": torch.ones(2, 2)}),
    "blk.9.attn_q.weight": lambda tensors: tensors.update({"blk.9.attn_q.weight": torch.ones(16, 2)}),
}


def test_tensor_that_is_missing_or_of_another_shape_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("llama")
    for change in DAMAGED.values():
        file = write(folder, tmp_path / "m.gguf", change=change)
        assert hf_import.main([str(file), str(tmp_path / "out")]) == 64
        assert not (tmp_path / "out").exists() and capsys.readouterr().err


def test_stack_of_experts_is_dequantised_once(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, sizes, whole = write(checkpoint("deepseek_v2"), tmp_path / "m.gguf"), [], gguf.dequantize
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: sizes.append(data.size) or whole(data, kind))
    (tmp_path / "out").mkdir()
    unpack(file, tmp_path / "out")
    assert sum(sizes) == sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors)


def test_file_that_names_no_groups_of_experts_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = write(checkpoint("deepseek_v2"), tmp_path / "m.gguf", **{"deepseek2.expert_group_count": None})
    with pytest.raises(ConfigError, match=r"expert_group_count.*is missing"):
        unpack(file, tmp_path)


def test_damaged_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF but not really")
    assert hf_import.main([str(tmp_path / "m.gguf"), str(tmp_path / "out")]) == 64
    assert "cannot be read as GGUF" in capsys.readouterr().err and not (tmp_path / "out").exists()
