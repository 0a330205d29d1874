"""The front doors: Hydra, Lightning CLI composed by Hydra, and Lightning CLI from a run's file, are one program.

They are tried one after the other in one process, which calls ``train.main`` as the command line would.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from warm import Warm

pytestmark = pytest.mark.xdist_group("train")  # its fixture runs a whole program, once

DRIVER = """
import contextlib, io, json, pathlib, shutil, sys, traceback
import train
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

Hydra.get_mode = lambda *_, **__: RunMode.RUN  # else it composes everything once more to learn that

for name, arguments in json.load(sys.stdin).items():
    GlobalHydra.instance().clear()
    train._refusals.clear()
    sys.argv = ["train.py", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main()
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
            code = "raised"
    results = pathlib.Path("run/results.json")
    if results.exists():  # "config" writes it anew
        shutil.copy(results, f"{name}.json")
    print(json.dumps({"name": name, "code": code or 0, "out": out.getvalue(), "err": err.getvalue()}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def doors(small: list[str], warm: Warm, environment: dict[str, str], folder: Path) -> dict[str, dict[str, Any]]:
    """What each command said."""
    choice = [*small, "model/attention=gqa", f"paths.log_dir={folder}/logs"]
    last = f"{folder}/run/checkpoints/last.ckpt"
    bare = [o for o in choice if not o.startswith(("callbacks.", "trainer."))]
    commands = {
        "hydra": [*choice, f"hydra.run.dir={folder}/run"],
        "compose": ["fit", "--compose", *choice, "task_name=compose"],
        "config": ["fit", "--config", f"{folder}/run/lightning_cli.yaml", "--trainer.default_root_dir", f"{folder}/x"],
        "print": ["fit", "--compose", *choice, "--print_config"],
        "help": ["fit", "--help"],
        "validate": ["validate", "--compose", *choice, "--ckpt_path", last],
        "predict": ["predict", "--compose", *choice, "--ckpt_path", last],
        "validate anew": ["validate", "--compose", *choice],
        "go on": [
            *choice,
            f"hydra.run.dir={folder}/on",
            f"ckpt_path={last}",
            "trainer.max_steps=8",
            "optimizer.lr=0.01",
        ],
        "go on by compose": [
            *("fit", "--compose", *choice, "task_name=on", "trainer.max_steps=8", "optimizer.lr=0.01"),
            *("--ckpt_path", last),
        ],
        "test only": [*choice, f"hydra.run.dir={folder}/only", f"ckpt_path={last}", "train=false", "test=true"],
        "debug fdr": [*bare, "debug=fdr", f"hydra.run.dir={folder}/fdr"],
        "debug overfit": [*bare, "debug=overfit", "trainer.max_steps=60", f"hydra.run.dir={folder}/overfit"],
        # mistakes
        "unknown key": ["fit", "--compose", "model.d_modle=3"],
        "unknown key of a block": ["fit", "--compose", *choice, "+model.attention.widow=3"],
        "unknown argument": ["fit", "--trainer.max_stepz=3"],
        "value refused by the data": ["fit", "--compose", *choice, "--data.batch_size=0"],
        "no checkpoint": ["validate", "--compose", *choice, "--ckpt_path", "nope.ckpt"],
        "another model's checkpoint": ["validate", "--compose", *choice, "model.d_model=32", "--ckpt_path", last],
    }
    done = warm.run("-c", DRIVER, input=json.dumps(commands), cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return {outcome["name"]: outcome for outcome in map(json.loads, done.stdout.splitlines())}


def metrics_of(file: Path) -> dict[str, float]:
    results = json.loads(file.read_text())
    assert results["status"] == "completed"
    return {k: v for k, v in results["metrics"].items() if not k.startswith("speed/")}


def logged(run: Path, name: str) -> list[float]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def test_run_leaves_everything_a_person_needs(doors: dict[str, dict[str, Any]], folder: Path) -> None:
    assert doors["hydra"]["code"] == 0, doors["hydra"]["err"]
    left = {p.relative_to(folder / "run").as_posix() for p in (folder / "run").rglob("*") if p.is_file()}
    wanted = {"results.json", "loss.png", "expert_load.png", "sample.txt", "lightning_cli.yaml", "config_tree.log"}
    wanted |= {
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "csv/metrics.csv",
        ".hydra/overrides.yaml",
        "train.log",
    }
    assert left >= wanted
    assert any(name.startswith("tensorboard/events") for name in left)
    assert "Traceback" not in doors["hydra"]["err"]


def test_three_doors_give_the_same_figures_to_the_last_digit(doors: dict[str, dict[str, Any]], folder: Path) -> None:
    for door in ("hydra", "compose", "config"):
        assert doors[door]["code"] == 0, doors[door]["err"]
    by_hydra = metrics_of(folder / "hydra.json")
    assert by_hydra == metrics_of(only(folder / "logs" / "compose" / "cli") / "results.json")
    assert by_hydra == metrics_of(folder / "config.json")
    seconds = [
        json.loads((folder / f"{door}.json").read_text())["metrics"]["speed/mfu"] for door in ("hydra", "config")
    ]
    assert seconds[0] != seconds[1]  # it was written anew
    assert {"train/loss", "val/loss", "val/bits_per_byte", "train/expert_balance"} <= set(by_hydra)
    printed = re.findall(r"^step=\d+ val/loss=\S+", doors["hydra"]["out"], re.M)
    assert len(printed) == 3
    for door in ("compose", "config"):
        assert re.findall(r"^step=\d+ val/loss=\S+", doors[door]["out"], re.M) == printed
    steps = re.findall(r"^step=\d+ train/loss=\S+ train/lr=\S+", doors["hydra"]["out"], re.M)
    assert len(steps) == 6
    for door in ("compose", "config"):
        assert re.findall(r"^step=\d+ train/loss=\S+ train/lr=\S+", doors[door]["out"], re.M) == steps


def test_exported_file_holds_no_hydra(doors: dict[str, dict[str, Any]], folder: Path) -> None:
    text = (folder / "run" / "lightning_cli.yaml").read_text()
    assert doors and "_target_" not in text and "${" not in text
    written = yaml.safe_load(text)
    assert written["model"]["class_path"] == "training.causal_lm.CausalLM"
    assert written["model"]["init_args"]["model"]["attention"]["name"] == "gqa"
    assert written["weights_only"] is True


def test_printed_configuration_is_the_composed_one(doors: dict[str, dict[str, Any]]) -> None:
    assert doors["print"]["code"] == 0, doors["print"]["err"]
    printed = yaml.safe_load(doors["print"]["out"])
    assert printed["trainer"]["max_steps"] == 6
    assert printed["model"]["init_args"]["model"]["attention"]["name"] == "gqa"


def test_help_of_the_cli_names_its_way_to_compose(doors: dict[str, dict[str, Any]]) -> None:
    assert doors["help"]["code"] == 0
    assert "--compose" in doors["help"]["out"] and "--trainer.max_steps" in doors["help"]["out"]


def test_validating_a_checkpoint_gives_the_figures_of_its_run(doors: dict[str, dict[str, Any]], folder: Path) -> None:
    assert doors["validate"]["code"] == 0, doors["validate"]["err"]
    # The run ended with all held-out text, `validate` looks at data.eval_windows of it: here the same, for it is short.
    wanted = metrics_of(folder / "run" / "results.json")["val/loss"]
    (found,) = re.findall(r"val/loss=(\S+)", doors["validate"]["out"])
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    (fresh,) = re.findall(r"val/loss=(\S+)", doors["validate anew"]["out"])
    assert float(fresh) > wanted + 0.5


def test_predicting_runs(doors: dict[str, dict[str, Any]]) -> None:
    assert doors["predict"]["code"] == 0, doors["predict"]["err"]


def test_testing_without_training_measures_the_checkpoint(doors: dict[str, dict[str, Any]], folder: Path) -> None:
    assert doors["test only"]["code"] == 0, doors["test only"]["err"]
    found = metrics_of(folder / "only" / "results.json")
    assert found["val/loss"] == metrics_of(folder / "run" / "results.json")["val/loss"]
    assert found["test/loss"] > 0


@pytest.mark.parametrize("door", ["go on", "go on by compose"])
def test_settings_on_the_command_line_win_over_a_checkpoint(
    door: str, doors: dict[str, dict[str, Any]], folder: Path
) -> None:
    assert doors[door]["code"] == 0, doors[door]["err"]
    run = folder / "on" if door == "go on" else only(folder / "logs" / "on" / "cli")
    rates = logged(run, "train/lr")
    assert len(rates) == 2  # steps 7 and 8 of 8
    assert rates[-1] == pytest.approx(0.001)  # a tenth of 0.01, and not of the checkpoint's 0.005
    assert rates[0] > rates[-1]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8


def test_debug_run_of_one_batch_ends_well(doors: dict[str, dict[str, Any]], folder: Path) -> None:
    assert doors["debug fdr"]["code"] == 0, doors["debug fdr"]["err"]
    assert not list((folder / "fdr").rglob("*.ckpt"))


def test_debug_run_on_three_batches_learns_them_by_heart(doors: dict[str, dict[str, Any]], folder: Path) -> None:
    assert doors["debug overfit"]["code"] == 0, doors["debug overfit"]["err"]
    (file,) = (folder / "overfit").rglob("*.ckpt")
    nll = torch.load(file, weights_only=True)["state_dict"]
    assert nll  # its loss is checked where it can be read: in training's own progress
    last = re.findall(r"train/loss[:=]\s*(\d+\.\d+)", doors["debug overfit"]["out"])[-1]
    assert float(last) < 0.5


MISTAKES = {
    "unknown key": "model.d_modle",
    "unknown key of a block": "model.attention.widow",
    "value refused by the data": "data.batch_size",
    "no checkpoint": "ckpt_path",
    "another model's checkpoint": "ckpt_path",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_at_the_cli_door_is_one_message(name: str, doors: dict[str, dict[str, Any]]) -> None:
    said = doors[name]["err"] + doors[name]["out"]
    assert doors[name]["code"] == 64, said
    assert "Traceback" not in said
    assert re.findall(r"^error: (.+?) = ", said, re.M) == [MISTAKES[name]]
    assert re.search(r"^  remedy: .", said, re.M)


def test_argument_the_cli_has_not_is_named_without_a_traceback(doors: dict[str, dict[str, Any]]) -> None:
    said = doors["unknown argument"]["err"]
    assert doors["unknown argument"]["code"] == 64
    assert "Traceback" not in said and "trainer.max_stepz" in said.splitlines()[-1]


def test_printed_continuation_is_a_command_that_composes(doors: dict[str, dict[str, Any]]) -> None:
    import shlex

    from training.composition import compose_config

    (line,) = re.findall(r"^Continue: python train\.py (.+)$", doors["hydra"]["out"], re.M)
    words = shlex.split(line)
    cfg = compose_config(words, output_dir="x")
    assert cfg.trainer.max_steps == 12 and cfg.model.attention.name == "gqa"
    assert Path(cfg.ckpt_path).name == "last.ckpt" and Path(cfg.ckpt_path).is_file()


@pytest.mark.slow
def test_real_command_line_repeats_a_run_from_its_file(
    doors: dict[str, dict[str, Any]], folder: Path, train_py: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    before = metrics_of(folder / "run" / "results.json")
    done = train_py("fit", "--config", str(folder / "run" / "lightning_cli.yaml"))
    assert done.returncode == 0, done.stderr
    assert metrics_of(folder / "run" / "results.json") == before


@pytest.mark.slow
def test_two_processes_train_what_one_does(
    small: list[str], train_py: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    moving = ["model/gating=sigmoid_bias", "model.gating.bias_step=0.05", "trainer.accumulate_grad_batches=2"]
    moving += ["optimizer.ns_dtype=float32"]  # bfloat16 makes of sums in another order another choice of an expert
    for name in ("default", "ddp_sim"):
        done = train_py(*small, *moving, "data.batch_size=4", f"trainer={name}", f"hydra.run.dir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
    one, two = (metrics_of(tmp_path / name / "results.json") for name in ("default", "ddp_sim"))
    one, two = ({k: v for k, v in each.items() if not k.startswith("val_load/")} for each in (one, two))
    assert two == pytest.approx(one, rel=1e-4)  # the loads of validation count rows that fill up a batch, too
    one, two = (
        torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("default", "ddp_sim")
    )
    bias = "decoder.layers.1.ffn.gating.bias"
    assert torch.equal(one["state_dict"][bias], two["state_dict"][bias]) and one["state_dict"][bias].abs().max() > 0
    assert len([p for p in (tmp_path / "ddp_sim").iterdir() if p.name.startswith(".hydra")]) == 1


@pytest.mark.slow
def test_cli_door_runs_two_processes(
    small: list[str], train_py: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = train_py("fit", "--compose", *small, "trainer=ddp_sim", f"paths.log_dir={tmp_path}/logs")
    assert done.returncode == 0, done.stderr
    run = only(tmp_path / "logs" / "train" / "cli")  # one folder, though each process composed for itself
    assert metrics_of(run / "results.json")["val/loss"] > 0
