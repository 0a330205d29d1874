"""Fine-tuning: a run starts from an imported checkpoint, through both entry points, and resumes from its own."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from blockwright.blocks.checkpoint.source import load
from blockwright.blocks.compose import compose, read
from blockwright.registry import ConfigError
from blockwright.training.configuration import parts
from blockwright.training.configuration.composing import compose_config
from blockwright.training.entry.preflight import preflight
from tests import built

pytestmark = pytest.mark.xdist_group("init_from")  # its models are made once

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def imported(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of bytes, as if imported from elsewhere."""
    folder = tmp_path_factory.mktemp("imported")
    return built.imported(compose(tiny(vocab_size=257), seed=7), folder / "out")


@pytest.fixture
def settings(small: list[str]) -> list[str]:
    """The small run without changes to the model."""
    return [o for o in small if not o.startswith("model.")]


@pytest.fixture
def checked_start(settings: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def make(*overrides: str) -> dict[str, Any]:
        return preflight(compose_config([*settings, *overrides], output_dir=str(tmp_path / "run")))

    return make


def test_task_starts_from_the_weights(checked_start: Callable[..., dict[str, Any]], imported: Path) -> None:
    task = parts.build("task", checked_start(f"init_from={imported}", "model=pretrained", "seed=3"))
    task.configure_model()
    expected = load(imported).state_dict()
    assert task.decoder.state_dict().keys() == expected.keys()
    assert all(torch.equal(task.decoder.state_dict()[k], v) for k, v in expected.items())


def test_composition_comes_from_there_and_may_be_patched(checked_start: Any, imported: Path) -> None:
    plain = checked_start(f"init_from={imported}", "model=pretrained", "+model.max_positions=33", "+model.norm.eps=0.1")
    model = plain["model"]
    assert (model["attention"]["name"], model["max_positions"], model["norm"]["eps"]) == ("gqa", 33, 0.1)
    assert "pretrained" not in model


@pytest.mark.parametrize(
    ("overrides", "path", "words"),
    [
        (["init_from=OUT"], "init_from", "Add model=pretrained"),  # the default model is another
        (["model=pretrained"], "init_from", "none is named"),
    ],
)
def test_start_that_cannot_be_right_is_refused(
    overrides: list[str], path: str, words: str, checked_start: Callable[..., dict[str, Any]], imported: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        checked_start(*(o.replace("OUT", str(imported)) for o in overrides))
    assert caught.value.path == path


def losses(folder: Path) -> list[str]:
    """The training losses that a run has logged."""
    file = next(folder.rglob("metrics.csv"))
    return [row["train/loss"] for row in csv.DictReader(file.open()) if row.get("train/loss")]


@pytest.mark.slow
def test_both_doors_start_from_it_and_a_resumed_run_does_not_read_it_again(
    settings: list[str], imported: Path, train_py: Run, tmp_path: Path
) -> None:
    start = [f"init_from={imported}", "model=pretrained", "trainer.max_steps=3", "callbacks.report=null"]
    logs = "paths.log_dir=" + str(tmp_path / "logs")
    hydra = train_py(*settings, *start, logs, f"hydra.run.dir={tmp_path / 'hydra'}")
    assert hydra.returncode == 0, hydra.stderr
    first = losses(tmp_path / "hydra")
    cli = train_py("fit", "--config", str(tmp_path / "hydra" / "lightning_cli.yaml"), f"--run_dir={tmp_path / 'cli'}")
    assert cli.returncode == 0, cli.stderr
    assert len(first) == 3 and losses(tmp_path / "cli") == losses(tmp_path / "hydra") == first
    weights = imported / "model.safetensors"
    kept = weights.read_bytes()
    weights.unlink()
    try:
        last = tmp_path / "hydra" / "checkpoints" / "last.ckpt"
        longer = [*settings, *start[:2], "trainer.max_steps=5", "callbacks.report=null", logs]
        again = train_py(*longer, f"ckpt_path={last}", f"hydra.run.dir={tmp_path / 'again'}")
        assert again.returncode == 0, again.stderr
        config = str(tmp_path / "hydra" / "lightning_cli.yaml")
        further = train_py("fit", "--config", config, "--trainer.max_steps=5", f"--ckpt_path={last}")
        assert further.returncode == 0, further.stderr
        (by_cli,) = (tmp_path / "logs").glob("*/cli/*/checkpoints/last.ckpt")
        for file in (last, tmp_path / "again" / "checkpoints" / "last.ckpt", by_cli):  # as asked, at every start
            assert torch.load(file, weights_only=True)["configuration"]["init_from"] == str(imported)
        anew = train_py(*longer)
        assert anew.returncode == 64 and "model.safetensors" in anew.stderr
    finally:
        weights.write_bytes(kept)


# --- from a run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run, with what its checkpoint has to hold."""
    run = tmp_path_factory.mktemp("run")
    decoder = compose(tiny(vocab_size=257), seed=7)
    optimizer = {"_target_": "blockwright.training.optimizers.matrices.Muon", "lr": 0.01}
    checkpoint = {
        "state_dict": {f"decoder.{k}": v for k, v in decoder.state_dict().items()},
        "hyper_parameters": {"model": decoder.config},
        "lr_schedulers": [{"_last_lr": [0.002], "base_lrs": [0.01]}],
        "global_step": 6,
        "configuration": {
            "seed": 0,
            "init_from": None,
            "scheduler": {},
            "task": {},
            "trainer": {},
            "model": read(decoder.config),
            "optimizer": optimizer,
            "data": {"sequence_length": 32},
        },
    }
    (run / "checkpoints").mkdir()
    torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
    return run


EXTENDED = ["model=pretrained", "scheduler=constant", "data.sequence_length=64", "+model.max_positions=256"]
YARN = ["+model/position=yarn", "model.position.pairing=half_split"]


def test_a_run_is_extended_with_other_positions_and_the_same_weights(checked_start: Any, trained: Path) -> None:
    yarn = [*YARN, "model.position.factor=8", "model.position.original_positions=32", "optimizer.lr=last"]
    plain = checked_start(*EXTENDED, f"init_from={trained}", *yarn)
    assert plain["model"]["position"]["name"] == "yarn" and plain["model"]["max_positions"] == 256
    assert plain["optimizer"]["lr"] == pytest.approx(0.002)
    task = parts.build("task", plain)
    task.configure_model()
    expected = load(trained).state_dict()
    assert all(torch.equal(task.decoder.state_dict()[k], v) for k, v in expected.items())
    assert task.decoder.layers[0].attention.position.factor == 8


def test_an_extension_that_cannot_be_right_is_refused(checked_start: Any, trained: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        checked_start(*EXTENDED, f"init_from={trained}", YARN[0])
    assert caught.value.path == "model.position.pairing"
