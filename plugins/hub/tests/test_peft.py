"""PEFT's adapters: ours load in PEFT on the wrapper, PEFT's load here, stacks of experts included."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from blockwright.blocks.compose import compose
from blockwright.blocks.lora import B, attach, is_adapter
from blockwright.plugins.hub.peft import IDLE, ONLY, READ, _settings, read_adapter, write_adapter
from blockwright.registry import ConfigError

peft = pytest.importorskip("peft", reason="needs blockwright[trl]")
MLA = {"attention": {"name": "mla"}}
TOKENS = (torch.arange(24) * 7 % 61).view(2, 12)
Make = Callable[..., Any]
LINEAR = ["attention.query", "attention.kv_up", "attention.output", "ffn.shared.gate", "head"]
STACKS = ["ffn.experts.gate_up", "ffn.experts.down"]


def draw(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)


@pytest.mark.parametrize("stacks", [STACKS, STACKS[1:]])
def test_adapter_of_peft_is_read(wrapped: Make, tmp_path: Path, stacks: list[str]) -> None:
    """Matrices and stacks; and PEFT's adapter is seen by decoding too, where MLA would read a matrix by itself."""
    model = wrapped(**MLA)
    base = {name: tensor.clone() for name, tensor in model.decoder.state_dict().items()}
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR, target_parameters=stacks)
    )
    draw(adapted)
    adapted.eval().save_pretrained(tmp_path)
    expected = adapted(TOKENS).logits
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    decoded = adapted.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **how)
    last = adapted(decoded.sequences[:, :-1]).logits[:, -1]
    torch.testing.assert_close(decoded.logits[-1].double(), last, atol=1e-5, rtol=0)
    ours = compose(model.config.composition).double().eval()
    ours.load_state_dict(base)
    values, scale = read_adapter(tmp_path, compose(model.config.composition, device="meta"))
    attach(ours, sorted({name[: -len(B)] for name in values}), 3, scale)
    ours.load_state_dict({**base, **values})
    assert len(values) > 2 * len(LINEAR) and (expected - wrapped(**MLA)(TOKENS).logits).abs().max() > 1e-2
    torch.testing.assert_close(ours(TOKENS), expected)


def test_peft_reads_our_adapter(wrapped: Make, tmp_path: Path) -> None:
    model = wrapped(**MLA)
    ours = compose(model.config.composition).double().eval()
    ours.load_state_dict(model.decoder.state_dict())
    layers = ("layers.0.attention.query.weight", "layers.1.attention.kv_up.weight", "head.weight")
    attach(ours, [*layers, *(f"layers.1.{s}" for s in STACKS)], 3, 2.0)
    draw(ours)
    tensors = {name: p.detach() for name, p in ours.named_parameters() if is_adapter(name)}
    meta = compose(model.config.composition, device="meta")
    assert write_adapter(tensors, {"rank": 3, "alpha": 6.0}, meta, tmp_path / "a") == "blockwright"
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "a").eval()
    torch.testing.assert_close(adapted(TOKENS).logits, ours(TOKENS))
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(TOKENS).logits, ours(TOKENS))


OTHERS: list[dict[str, Any]] = [
    {"peft_type": "IA3"},
    *({"r": rank} for rank in (0, True, 2)),  # 2 is not that of the tensors
    *({"lora_alpha": alpha} for alpha in (math.nan, math.inf, True, -1e308, 0, 1e300, "8", None)),
    {"use_rslora": "yes"},
    {"target_parameters": "down"},
    {"of_a_later_peft": 1},
    {"target_parameters": []},
]


def test_adapter_of_another_kind_is_refused(wrapped: Make, tmp_path: Path) -> None:
    model = wrapped(**MLA)
    config = peft.LoraConfig(r=3, target_modules=LINEAR, target_parameters=STACKS)
    peft.get_peft_model(model, config).save_pretrained(tmp_path)
    file, meta = tmp_path / "adapter_config.json", compose(model.config.composition, device="meta")
    plain = json.loads(file.read_text())
    assert read_adapter(tmp_path, meta)
    for change in OTHERS:
        file.write_text(json.dumps({**plain, **change}))
        with pytest.raises(ConfigError):
            pytest.fail(f"{change}: {read_adapter(tmp_path, meta)}")


def test_tensor_that_is_no_matrix_is_refused(wrapped: Make, tmp_path: Path) -> None:
    model = wrapped(**MLA)
    peft.get_peft_model(model, peft.LoraConfig(r=3, target_modules=["head"])).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.flatten() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="is not a matrix"):
        read_adapter(tmp_path, compose(model.config.composition, device="meta"))


# Every setting of the installed PEFT → a value with an effect, where it is neither read nor without an effect here.
EFFECTS: dict[str, Any] = {
    "bias": "all",
    "modules_to_save": ["head"],
    "init_lora_weights": "pissa",
    "rank_pattern": {"query": 2},
    "alpha_pattern": {"query": 2},
    "megatron_config": {"a": 1},
    "trainable_token_indices": [1],
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
    "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1, 2],
    "monteclora_config": {"a": 1},
    "layer_replication": [[0, 1]],
    "use_bdlora": {"a": 1},
    "arrow_config": {"top_k": 2},
    "kasa_config": {"a": 1},
}


def test_every_setting_of_peft_is_obeyed_without_effect_or_refused() -> None:
    """Of the installed version: a new setting is refused as long as it is not listed."""
    defaults = peft.LoraConfig(r=1).to_dict()
    for name in (field.name for field in dataclasses.fields(peft.LoraConfig)):
        if name in READ or name in IDLE:
            assert name in READ or IDLE[name]
            continue
        with pytest.raises(ConfigError, match=rf"{name}.*its effect would be lost"):
            _settings({"r": 1, "lora_alpha": 1, name: EFFECTS.get(name, True)}, "adapter_config.json")
        assert _settings({"r": 4, "lora_alpha": 8, name: defaults.get(name)}, "…") == (4, 2.0), name


@pytest.mark.parametrize("start", ["olora", "corda", "loftq", "lora_ga", "pissa_niter_4", "kasa"])
def test_start_that_changes_the_base_is_refused(start: str) -> None:
    with pytest.raises(ConfigError, match="init_lora_weights"):
        _settings({"r": 1, "lora_alpha": 1, "init_lora_weights": start}, "…")


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal"])
def test_start_that_keeps_the_base_is_read(start: str) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=start).to_dict()
    assert _settings({**config, "peft_type": "LORA"}, "…") == (4, 2.0)


def test_tables_name_settings_of_peft_once() -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {*READ, *IDLE, *ONLY} <= fields and len({*READ, *IDLE, *ONLY}) == len(READ) + len(IDLE) + len(ONLY)
