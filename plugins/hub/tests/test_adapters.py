"""An adapter is exported in PEFT's layout, and a run starts from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.compose import compose
from blockwright.plugins.hub import hf_export
from blockwright.plugins.hub.exporting import export_folder
from blockwright.plugins.hub.importing import import_folder
from blockwright.registry import ConfigError

LORA = (
    "model=pretrained",
    "adapter=lora",
    "adapter.rank=4",
    "scheduler=constant",
    "optimizer=adamw",
    "optimizer.lr=0.01",
)


@pytest.fixture(scope="module")
def base(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model with MLA and experts."""
    file = tmp_path_factory.mktemp("base") / "base.ckpt"
    decoder = compose(tiny(moe=True, vocab_size=257, attention={"name": "mla"}), seed=7)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, file)
    return file


@pytest.fixture
def lora(base: Path) -> tuple[str, ...]:
    return (*LORA, f"init_from={base}", "adapter.targets=[attention,experts]")


@pytest.fixture(name="small")
def without_a_model(small: list[str]) -> list[str]:
    """The small run without changes to its model, which is the base's here."""
    return [o for o in small if not o.startswith("model.")]


@pytest.mark.slow
def test_adapter_leaves_and_returns_in_pefts_layout(
    fit: Callable[..., Any], lora: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = fit(*lora, "trainer.max_steps=2")
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    given = [str(tmp_path / "run.ckpt"), str(tmp_path / "adapter"), "--adapter"]
    assert hf_export.main([*given, "--dtype", "bfloat16"]) == hf_export.main([*given, "--to", "automodel"]) == 64
    assert hf_export.main(given) == 0
    started = fit(*lora, f"adapter.start={tmp_path / 'adapter'}", "trainer.max_steps=1", "optimizer.lr=1e-12")
    ours, theirs = trainer.lightning_module.decoder, started.lightning_module.decoder
    for name, parameter in ours.named_parameters():
        assert torch.allclose(dict(theirs.named_parameters())[name], parameter, atol=1e-9), name
    with pytest.raises(ConfigError, match=r"adapter\.start.*holds another adapter"):
        fit(*lora, f"adapter.start={tmp_path / 'adapter'}", "adapter.rank=3")


def test_export_of_a_run_without_adapter_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hf_export.main([str(base), str(tmp_path / "out"), "--adapter"]) == 64
    assert "holds no adapter" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_llama_like_adapter_has_published_names(
    tiny: Callable[..., dict[str, Any]], fit: Callable[..., Any], tmp_path: Path
) -> None:
    """So that PEFT loads it on transformers' own model of the same weights."""
    decoder = compose(tiny(vocab_size=257), seed=7)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    torch.save({"state_dict": weights, "hyper_parameters": {"model": decoder.config}}, tmp_path / "some.ckpt")
    export_folder(tmp_path / "some.ckpt", tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "out")
    trainer = fit(*LORA, f"init_from={tmp_path / 'out'}", "trainer.max_steps=2", "adapter.targets=[attention,ffn]")
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert hf_export.main([str(tmp_path / "run.ckpt"), str(tmp_path / "adapter"), "--adapter"]) == 0
    peft = pytest.importorskip("peft", reason="needs blockwright[trl]")
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "adapter"
    ).eval()
    tokens = torch.arange(20).view(2, 10)
    ours = trainer.lightning_module.decoder.eval()(tokens)
    assert torch.allclose(model(tokens).logits, ours, atol=1e-5) and (ours - decoder(tokens)).abs().max() > 1e-3
