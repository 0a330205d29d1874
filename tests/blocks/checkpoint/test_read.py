"""A checkpoint rebuilds its model with no YAML at hand, and runs nothing of an untrusted one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from blockwright.blocks.checkpoint.read import check_fits, read_checkpoint
from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError


class Hostile:
    """Unpickled, it runs a command."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def saved(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., Path]:
    """A file like a checkpoint of the task, around a freshly made model."""

    def save(model: dict[str, Any] | None = None, **more: Any) -> Path:
        decoder = compose(model or tiny(moe=True), seed=3)
        weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
        weights["losses.train_loss.nats"] = torch.zeros(())
        parts = {"state_dict": weights, "hyper_parameters": {"model": decoder.config, "seed": 3}}
        torch.save({**parts, **more}, tmp_path / "some.ckpt")
        return tmp_path / "some.ckpt"

    return save


def refusal(path: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(path)
    assert caught.value.path == "ckpt_path" and caught.value.remedy
    return caught.value


def test_trained_model_is_rebuilt_with_the_same_logits_and_runs_no_code(
    fit: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    trainer = fit("model/gating=sigmoid_bias", "model/position=learned", "model.gating.bias_step=0.1")
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    checkpoint = read_checkpoint(tmp_path / "trained.ckpt")
    assert checkpoint["global_step"] == 6
    assert checkpoint["hyper_parameters"]["model"]["attention"]["name"] == "mla"
    assert checkpoint["TextDataModule"]["tokenizer"]["kind"] == "bytes"
    decoder, tokens = load(tmp_path / "trained.ckpt"), torch.randint(257, (2, 30))
    task = trainer.lightning_module.eval()
    assert not decoder.training
    with torch.no_grad():
        assert torch.equal(decoder(tokens), task(tokens))
    assert decoder.layers[1].ffn.gating.bias.abs().max() > 0  # type: ignore[union-attr, operator]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "trained.ckpt").rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert torch.equal(load(tmp_path / "run")(tokens), decoder(tokens))


def test_hostile_file_is_refused_and_runs_nothing(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved(callbacks={"x": Hostile(tmp_path / "ran")})
    error = refusal(path)
    assert "system" in error.rule and "weights_only" not in str(error)  # torch advises to load it unsafely
    with pytest.raises(ConfigError):
        load(path)
    assert not (tmp_path / "ran").exists()


MODEL: dict[str, Any] = {"model": {}}
NONE: list[Any] = [b"", b"garbage", b"PK\x03\x04 cut short", {"state_dict": {}}, {"hyper_parameters": {}}, [1, 2]]
NONE += [torch.zeros(2), *({"hyper_parameters": settings, "state_dict": {}} for settings in (None, 5))]
WEIGHTLESS: list[Any] = [None, 5, {5: torch.ones(1)}, {"decoder.norm.weight": 1}]
NONE += [{"hyper_parameters": MODEL, "state_dict": weights} for weights in WEIGHTLESS]


def test_what_is_no_checkpoint_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    refusal(tmp_path / "nope.ckpt")
    refusal(tmp_path)
    for content in NONE:
        if isinstance(content, bytes):
            (tmp_path / "x.ckpt").write_bytes(content)
        else:
            torch.save(content, tmp_path / "x.ckpt")
        refusal(tmp_path / "x.ckpt")
    path = saved()
    path.write_bytes(path.read_bytes()[:-1000])
    refusal(path)


@pytest.mark.parametrize("shapes_only", [False, True])
def test_index_that_is_none_or_too_long_is_refused_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes_only: bool
) -> None:
    torch.save({}, tmp_path / "meta.pt")
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(ConfigError, match="no sharded checkpoint"):
        read_checkpoint(tmp_path, shapes_only=True)
    monkeypatch.setattr("blockwright.blocks.checkpoint.sharded.MAX_FILE_BYTES", 1)
    with pytest.raises(ConfigError, match="longer than 1 bytes") as caught:
        read_checkpoint(tmp_path, shapes_only=shapes_only)
    assert caught.value.path == str(tmp_path / ".metadata")


def test_block_that_is_not_installed_here_is_named(saved: Callable[..., Path]) -> None:
    path = saved()
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["model"]["attention"] = {"name": "of_a_plug_in"}
    torch.save(content, path)
    with pytest.raises(ConfigError, match="of_a_plug_in"):
        load(path)


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "model.d_model": ({"d_model": 96}, "embedding.weight"),
    "model.attention": ({"attention": {"name": "mha"}}, "layers.0.attention.key.weight"),
    "model.norm": ({"norm": {"name": "layernorm"}}, "norm.bias"),
    "model.gating": ({"gating": {"name": "sigmoid_bias"}}, "layers.1.ffn.gating.bias"),
    "model.n_layers": ({"n_layers": 1, "layout": None}, "layers"),
}


def test_checkpoint_of_another_model_is_refused_with_the_difference(
    saved: Callable[..., Path], tiny: Callable[..., dict[str, Any]]
) -> None:
    path = saved()
    checkpoint = read_checkpoint(path)
    check_fits(checkpoint, compose(tiny(moe=True), device="meta"), path)
    for part, (change, weight) in DIFFERENT.items():
        with pytest.raises(ConfigError) as caught:
            check_fits(checkpoint, compose(tiny(moe=True, **change), device="meta"), path)
        assert weight in caught.value.rule and part in caught.value.remedy
