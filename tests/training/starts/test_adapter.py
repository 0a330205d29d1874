"""``adapter=lora``: trained, resumed, and merged where a run is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.blocks.lora import is_adapter
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.record import record
from blockwright.training.configuration import parts

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
def test_run_resumes_bit_identical_and_reads_as_merged(
    fit: Callable[..., Any], lora: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    whole = fit(*lora, "trainer.max_steps=2")
    half = fit(*lora, "trainer.max_steps=1")
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = fit(*lora, f"ckpt_path={tmp_path / 'half.ckpt'}", "trainer.max_steps=2", ckpt_path=tmp_path / "half.ckpt")
    rest.save_checkpoint(tmp_path / "rest.ckpt")
    ours, theirs = whole.lightning_module.decoder.state_dict(), rest.lightning_module.decoder.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before = load(base)
    assert all(torch.equal(ours[name], tensor) for name, tensor in before.state_dict().items())
    assert all(ours[name].any() for name in ours if is_adapter(name))
    tokens, trained = torch.arange(20).view(2, 10), whole.lightning_module.decoder.eval()
    assert (trained(tokens) - before(tokens)).abs().max() > 1e-3
    assert torch.allclose(load(tmp_path / "rest.ckpt")(tokens), trained(tokens), atol=1e-5)  # W + BA rounds otherwise


@pytest.mark.slow
def test_resumed_run_records_the_starts_that_were_asked_for_and_reads_none(
    fit: Callable[..., Any], checked: Callable[..., Any], lora: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "half.ckpt"
    fit(*lora, "trainer.max_steps=1").save_checkpoint(file)
    asked = (
        *lora,
        "adapter.start=gone",
        "tower=siglip",
        "tower.folder=gone",
        f"ckpt_path={file}",
        "trainer.max_steps=2",
    )
    kept = record(checked(*asked))
    assert (kept["adapter"]["start"], kept["tower"]["folder"]) == ("gone", "gone") and kept["init_from"]
    assert fit(*asked, ckpt_path=file).global_step == 2


@pytest.mark.slow
def test_trainer_that_has_resumed_a_run_measures_another_from_its_own_start(
    fit: Callable[..., Any], checked: Callable[..., Any], lora: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    file = tmp_path / "half.ckpt"
    trainer = fit(*lora, "trainer.max_steps=1")
    trainer.save_checkpoint(file)
    plain = checked(*lora)
    data = parts.build("data", plain)
    trainer.validate(trainer.lightning_module, data, ckpt_path=file, weights_only=True, verbose=False)
    other = parts.build("task", plain)
    trainer.validate(other, data, verbose=False)
    weights = other.decoder.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in load(base).state_dict().items())


@pytest.mark.slow
def test_resuming_with_another_adapter_is_refused(
    fit: Callable[..., Any], lora: tuple[str, ...], tmp_path: Path
) -> None:
    file = tmp_path / "run.ckpt"
    fit(*lora, "trainer.max_steps=1").save_checkpoint(file)
    with pytest.raises(ConfigError, match=r"was trained with another model.*lora_a"):
        fit(*lora, f"ckpt_path={file}", "adapter.rank=2")
    with pytest.raises(ConfigError, match="was trained with another model"):
        fit(*(o for o in lora if "adapter" not in o), f"ckpt_path={file}")


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["adapter=lora"], "init_from", "would be random"),
        (["init_from=BASE", "adapter=lora", "adapter.targets=[norm]"], "adapter.targets", "linear layer or stack"),
        (["init_from=BASE", "adapter=lora", "adapter.start=nowhere"], "nowhere/adapter_config.json", "no such file"),
    ],
)
def test_wrong_settings_are_refused_before_work(
    checked: Callable[..., Any], base: Path, overrides: list[str], path: str, words: str
) -> None:
    given = [o.replace("BASE", str(base)) for o in overrides]
    model = ["model=pretrained"] if len(overrides) > 1 else []
    with pytest.raises(ConfigError) as caught:
        checked(*model, *given)
    assert caught.value.path.endswith(path) and words in caught.value.rule


@pytest.mark.slow
def test_frozen_run_resumes(fit: Callable[..., Any], tmp_path: Path) -> None:
    """Its optimizer has no state for frozen parts, neither in the checkpoint nor in the run that resumes."""
    small = ("model.n_layers=1", "task.frozen=[embedding]")
    fit(*small, "trainer.max_steps=1").save_checkpoint(tmp_path / "run.ckpt")
    path = tmp_path / "run.ckpt"
    assert fit(*small, f"ckpt_path={path}", "trainer.max_steps=2", ckpt_path=path).global_step == 2
