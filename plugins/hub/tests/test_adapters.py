"""Adapters in PEFT's layout: ours load in PEFT, PEFT's load here, stacks of experts included; a run starts from one."""

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
from transformers import AutoModelForCausalLM

from blockwright.blocks.compose import compose
from blockwright.blocks.linear import B, attach, is_adapter
from blockwright.plugins.hub import hf_export
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.importing import import_folder
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
    plain = model(TOKENS).logits
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=LINEAR, target_parameters=stacks)
    adapted = peft.get_peft_model(model, config)
    draw(adapted)
    adapted.eval().save_pretrained(tmp_path)
    expected = adapted(TOKENS).logits
    how = {"max_new_tokens": 3, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    decoded = adapted.generate(TOKENS, attention_mask=torch.ones_like(TOKENS), **how)
    last = adapted(decoded.sequences[:, :-1]).logits[:, -1]
    torch.testing.assert_close(decoded.logits[-1].double(), last, atol=1e-5, rtol=0)
    ours = compose(model.config.composition).double().eval()
    values, scale = read_adapter(tmp_path, compose(model.config.composition, device="meta"))
    attach(ours, sorted({name[: -len(B)] for name in values}), 3, scale)
    ours.load_state_dict({**base, **values})
    assert len(values) > 2 * len(LINEAR) and (expected - plain).abs().max() > 1e-2
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
    torch.testing.assert_close(adapted.merge_and_unload()(TOKENS).logits, ours(TOKENS))


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
    file.write_text(json.dumps(plain))
    tensors = load_file(tmp_path / "adapter_model.safetensors")  # no matrices
    save_file({name: tensor.flatten() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ConfigError):
        read_adapter(tmp_path, meta)


# A setting of the installed PEFT → a value with an effect, where True is none and it is not read here.
EFFECTS: dict[str, Any] = {"bias": "all", "modules_to_save": ["head"], "init_lora_weights": "pissa"}
EFFECTS |= {"rank_pattern": {"query": 2}, "alpha_pattern": {"query": 2}, "megatron_config": {"a": 1}}
EFFECTS |= {"trainable_token_indices": [1], "loftq_config": {"loftq_bits": 4}, "corda_config": {"corda_method": "ipm"}}
EFFECTS |= {"lora_ga_config": {"direction": "ArB2r"}, "velora_config": {"num_groups": 2}, "kasa_config": {"a": 1}}
EFFECTS |= {"alora_invocation_tokens": [1, 2], "monteclora_config": {"a": 1}, "layer_replication": [[0, 1]]}
EFFECTS |= {"use_bdlora": {"a": 1}, "arrow_config": {"top_k": 2}}


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
def test_every_setting_of_peft_is_obeyed_without_effect_or_refused() -> None:
    """Of the installed version: a new setting is refused as long as it is not listed."""
    defaults, given = peft.LoraConfig(r=1).to_dict(), {"r": 1, "lora_alpha": 1}
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert {*READ, *IDLE, *ONLY} <= fields and len({*READ, *IDLE, *ONLY}) == len(READ) + len(IDLE) + len(ONLY)
    for name in fields - {*READ, *IDLE}:
        with pytest.raises(ConfigError, match=name):
            _settings({**given, name: EFFECTS.get(name, True)}, "adapter_config.json")
        assert _settings({"r": 4, "lora_alpha": 8, name: defaults.get(name)}, "…") == (4, 2.0), name
    for start in ("olora", "corda", "loftq", "lora_ga", "pissa_niter_4", "kasa"):  # which change the base
        with pytest.raises(ConfigError, match="init_lora_weights"):
            _settings({**given, "init_lora_weights": start}, "…")
    for start in ("gaussian", "eva", "orthogonal"):
        config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=start).to_dict()
        assert _settings({**config, "peft_type": "LORA"}, "…") == (4, 2.0)


# ---- runs ------------------------------------------------------------------------------------------------------------

LORA = ("model=pretrained", "adapter=lora", "adapter.rank=4", "scheduler=constant", "optimizer=adamw")
LORA += ("optimizer.lr=0.01", "trainer.max_steps=2")


@pytest.fixture(name="small")
def without_a_model(small: list[str]) -> list[str]:
    """The small run without changes to its model, which is that of a checkpoint here."""
    return [o for o in small if not o.startswith("model.")]


def saved(model: dict[str, Any], file: Path) -> Any:
    decoder = compose(model, seed=7)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, file)
    return decoder


@pytest.mark.slow
def test_adapter_of_a_run_leaves_and_returns(tiny: Make, fit: Make, tmp_path: Path) -> None:
    saved(tiny(moe=True, vocab_size=257, **MLA), tmp_path / "base.ckpt")
    lora = (*LORA, f"init_from={tmp_path / 'base.ckpt'}", "adapter.targets=[attention,experts]")
    trainer = fit(*lora)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    given = [str(tmp_path / "run.ckpt"), str(tmp_path / "adapter"), "--adapter"]
    assert hf_export.main([*given, "--dtype", "bfloat16"]) == hf_export.main([*given, "--to", "automodel"]) == 64
    assert hf_export.main(given) == 0
    start = f"adapter.start={tmp_path / 'adapter'}"
    started = fit(*lora, start, "trainer.max_steps=1", "optimizer.lr=1e-12")
    ours, theirs = trainer.lightning_module.decoder, started.lightning_module.decoder
    for name, parameter in ours.named_parameters():
        assert torch.allclose(dict(theirs.named_parameters())[name], parameter, atol=1e-9), name
    with pytest.raises(ConfigError) as refusal:
        fit(*lora, start, "adapter.rank=3")
    assert refusal.value.path == "adapter.start"


@pytest.mark.slow
def test_llama_like_adapter_has_published_names(tiny: Make, fit: Make, tmp_path: Path) -> None:
    """So that PEFT loads it on transformers' own model of the same weights."""
    decoder = saved(tiny(vocab_size=257), tmp_path / "some.ckpt")
    export_folder(tmp_path / "some.ckpt", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "out")
    trainer = fit(*LORA, f"init_from={tmp_path / 'out'}", "adapter.targets=[attention,ffn]")
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert hf_export.main([str(tmp_path / "run.ckpt"), str(tmp_path / "adapter"), "--adapter"]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    model, tokens = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval(), torch.arange(20).view(2, 10)
    ours = trainer.lightning_module.decoder.eval()(tokens)
    assert torch.allclose(model(tokens).logits, ours, atol=1e-5) and (ours - decoder(tokens)).abs().max() > 1e-3
