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

from blockwright.blocks.checkpoint.fits import check_fits
from blockwright.blocks.checkpoint.read import read_checkpoint
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


def test_trained_model_is_rebuilt_with_the_same_logits(fit: Callable[..., L.Trainer], tmp_path: Path) -> None:
    trainer = fit("model/gating=sigmoid_bias", "model/position=learned", "model.gating.bias_step=0.1")
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    decoder = load(tmp_path / "trained.ckpt")
    tokens = torch.randint(257, (2, 30))
    task = trainer.lightning_module.eval()
    assert not decoder.training
    with torch.no_grad():
        assert torch.equal(decoder(tokens), task(tokens))
    assert decoder.layers[1].ffn.gating.bias.abs().max() > 0  # type: ignore[union-attr, operator]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "trained.ckpt").rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert torch.equal(load(tmp_path / "run")(tokens), decoder(tokens))


def test_whole_checkpoint_loads_without_running_code(fit: Callable[..., L.Trainer], tmp_path: Path) -> None:
    trainer = fit()
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    checkpoint = read_checkpoint(tmp_path / "trained.ckpt")
    assert checkpoint["global_step"] == 6
    assert checkpoint["hyper_parameters"]["model"]["attention"]["name"] == "mla"
    assert checkpoint["TextDataModule"]["tokenizer"]["kind"] == "bytes"


def test_hostile_file_is_refused_and_runs_nothing(saved: Callable[..., Path], tmp_path: Path) -> None:
    path = saved(callbacks={"x": Hostile(tmp_path / "ran")})
    error = refusal(path)
    assert "system" in error.rule and "weights_only" not in str(error)  # torch advises to load it unsafely
    with pytest.raises(ConfigError):
        load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
def test_file_that_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(content)
    assert "cannot be loaded safely" in refusal(tmp_path / "x.ckpt").rule


def sharded_folder(folder: Path, index: bytes) -> Path:
    (folder / ".metadata").write_bytes(index)
    torch.save({}, folder / "meta.pt")
    return folder


def test_index_that_is_none_is_not_called_a_file_of_torch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is no sharded checkpoint of torch"):
        read_checkpoint(sharded_folder(tmp_path, pickle.dumps({})), shapes_only=True)


@pytest.mark.parametrize("shapes_only", [False, True])
def test_refusal_of_an_index_is_passed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shapes_only: bool
) -> None:
    monkeypatch.setattr("blockwright.blocks.checkpoint.sharded.MAX_FILE_BYTES", 1)
    with pytest.raises(ConfigError) as caught:
        read_checkpoint(sharded_folder(tmp_path, b"long"), shapes_only=shapes_only)
    assert caught.value.path == str(tmp_path / ".metadata") and caught.value.rule == "is longer than 1 bytes"


def test_truncated_file_is_refused(saved: Callable[..., Path]) -> None:
    path = saved()
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be loaded safely" in refusal(path).rule


def test_what_is_not_there_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a checkpoint file" in refusal(tmp_path / "nope.ckpt").rule
    assert "is not a checkpoint file" in refusal(tmp_path).rule


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"hyper_parameters": {}}, [1, 2], torch.zeros(2)])
def test_file_without_a_composition_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    assert "holds no model composition" in refusal(tmp_path / "x.ckpt").rule


@pytest.mark.parametrize("settings", [None, 5])
def test_settings_that_are_no_mapping_are_refused(settings: Any, tmp_path: Path) -> None:
    torch.save({"hyper_parameters": settings, "state_dict": {}}, tmp_path / "x.ckpt")
    assert "holds no model composition" in refusal(tmp_path / "x.ckpt").rule


@pytest.mark.parametrize("weights", [None, 5, {5: torch.ones(1)}, {"decoder.norm.weight": 1}])
def test_file_without_weights_is_refused(weights: Any, tmp_path: Path) -> None:
    torch.save({"hyper_parameters": {"model": {}}, "state_dict": weights}, tmp_path / "x.ckpt")
    assert "holds no weights by name" in refusal(tmp_path / "x.ckpt").rule


def test_block_that_is_not_installed_here_is_named(saved: Callable[..., Path]) -> None:
    path = saved()
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["model"]["attention"] = {"name": "of_a_plug_in"}
    torch.save(content, path)
    with pytest.raises(ConfigError, match=r"of_a_plug_in.*no attention is registered"):
        load(path)


def test_fitting_checkpoint_is_accepted(saved: Callable[..., Path], tiny: Callable[..., dict[str, Any]]) -> None:
    path = saved()
    check_fits(read_checkpoint(path), compose(tiny(moe=True), device="meta"), path)


@pytest.mark.parametrize(
    ("change", "weight", "part"),
    [
        ({"d_model": 96}, "embedding.weight", "model.d_model"),
        ({"attention": {"name": "mha"}}, "layers.0.attention.key.weight", "model.attention"),
        ({"norm": {"name": "layernorm"}}, "norm.bias", "model.norm"),
        ({"gating": {"name": "sigmoid_bias"}}, "layers.1.ffn.gating.bias", "model.gating"),
        ({"n_layers": 1, "layout": None}, "layers", "model.n_layers"),
    ],
)
def test_checkpoint_of_another_model_is_refused_with_the_difference(
    saved: Callable[..., Path],
    tiny: Callable[..., dict[str, Any]],
    change: dict[str, Any],
    weight: str,
    part: str,
) -> None:
    path = saved()
    model = compose(tiny(moe=True, **change), device="meta")
    with pytest.raises(ConfigError) as caught:
        check_fits(read_checkpoint(path), model, path)
    assert weight in caught.value.rule and part in caught.value.remedy
