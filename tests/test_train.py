"""The front doors: Hydra, Lightning CLI composed by Hydra, and Lightning CLI from a run's file, are one program.

They are tried one after the other in one process, which calls ``train.main`` as the command line would.
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from programs import Outcome, run_all
from warm import Warm

from blockwright.lab.sweep import plan as plans
from blockwright.training.configuration.composing import compose_config

pytestmark = pytest.mark.xdist_group("programs")  # its fixtures run whole programs, once

Doors = dict[str, Outcome]
TrainPy = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doors")


@pytest.fixture(scope="module")
def choice(small: list[str], folder: Path) -> list[str]:
    # More validation text than data.eval_windows: what looks at a part of it has other figures.
    return [*small, "model/attention=gqa", f"paths.log_dir={folder}/logs", "data.corpus.val_fraction=0.3"]


@pytest.fixture(scope="module")
def entering(warm: Warm, environment: dict[str, str], folder: Path) -> Callable[[dict[str, list[str]]], Doors]:
    return lambda commands: run_all(warm.run, commands, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def front(choice: list[str], entering: Any, folder: Path) -> Doors:
    """A run, the same from its file, and a mistake."""
    last = f"{folder}/run/checkpoints/last.ckpt"
    return entering(
        {
            "hydra": [*choice, f"hydra.run.dir={folder}/run"],
            "config": ["fit", "--config", f"{folder}/run/lightning_cli.yaml"],
            "another model": ["validate", "--compose", *choice, "model.d_model=32", "--ckpt_path", last],
        }
    )


# Mistakes at the door of Lightning: the path of each; {run} is the folder of a run.
MISTAKES = {
    "fit --compose model.d_modle=3": "model.d_modle",
    "fit --trainer.max_stepz=3": "command line",
    "fit --compose CHOICE data.batch_size=0": "data.batch_size",
    "validate --compose CHOICE --ckpt_path nope.ckpt": "ckpt_path",
    "validate --compose CHOICE": "ckpt_path",
    "fit --config {run}/lightning_cli.yaml --run_dir {run}": "run_dir",
    "fit --compose CHOICE callbacks.checkpoint.dirpath={run}/checkpoints": "callbacks.checkpoint.dirpath",
    "fit --compose CHOICE --seed_everything=5000000000": "seed_everything",
}


@pytest.fixture(scope="module")
def doors(choice: list[str], entering: Any, folder: Path, front: Doors) -> Doors:
    """What each other command said too."""
    last, file = f"{folder}/run/checkpoints/last.ckpt", f"{folder}/run/lightning_cli.yaml"
    bare = [o for o in choice if not o.startswith(("callbacks.", "trainer."))]
    longer = ["trainer.max_steps=8", "optimizer.lr=0.01"]
    commands = {
        "compose": ["fit", "--compose", *choice, "task_name=compose"],
        "validate": ["validate", "--compose", *choice, "--ckpt_path", last, "--run_dir", f"{folder}/validate"],
        "test": ["test", "--config", file, "--ckpt_path", last, "--run_dir", f"{folder}/test"],
        "predict": ["predict", "--config", file, "--ckpt_path", last, "--run_dir", f"{folder}/predict"],
        "no validation": [
            *(*choice, "data.corpus.val_fraction=0", "optimized_metric=val/accuracy", "callbacks.report=null"),
            *(f"hydra.run.dir={folder}/sweep/0", "callbacks.progress=null", "trainer.max_steps=2"),
        ],
        "resume": [*choice, f"hydra.run.dir={folder}/on", f"ckpt_path={last}", *longer],
        "resume by config": [
            *("fit", "--config", file, "--ckpt_path", last, "--trainer.max_steps=8", "--run_dir", f"{folder}/further"),
        ],
        "test only": [*choice, f"hydra.run.dir={folder}/only", f"ckpt_path={last}", "train=false", "test=true"],
        "debug fdr": [*bare, "debug=fdr", f"hydra.run.dir={folder}/fdr"],
    }
    for mistake in MISTAKES:
        words = mistake.replace("{run}", f"{folder}/run").split()
        commands[mistake] = [given for word in words for given in (choice if word == "CHOICE" else [word])]
    plans.write(folder / "sweep", {"kind": "grid", "metric": "val/loss", "direction": "minimize", "jobs": []})
    return {**front, **entering(commands)}


def metrics_of(run: Path) -> dict[str, float]:
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "completed"
    return {k: v for k, v in results["metrics"].items() if not k.startswith("speed/")}


def logged(run: Path, name: str) -> list[float]:
    with (run / "csv" / "metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def last_step(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def only(folder: Path) -> Path:
    (run,) = folder.iterdir()
    return run


def files_in(run: Path) -> set[str]:
    return {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()}


def assert_one_message(said: Outcome, path: str) -> None:
    text = said.said
    assert said.code == 64 and "Traceback" not in text, text
    assert re.findall(r"^error: (.+?) = ", text, re.M) == [path]
    assert re.search(r"^  remedy: .", text, re.M)


def assert_same_figures(one: Path, other: Path, *said: str) -> None:
    """To the last digit, in what is written and in what is printed."""
    assert metrics_of(one) == metrics_of(other)
    for line, n in ((r"^step=\d+ val/loss=\S+", 3), (r"^step=\d+ train/loss=\S+ train/lr=\S+", 6)):
        ours, theirs = (re.findall(line, out, re.M) for out in said)
        assert ours == theirs and len(ours) == n


def test_run_leaves_everything_a_person_needs(front: Doors, folder: Path) -> None:
    assert front["hydra"].code == 0 and "Traceback" not in front["hydra"].err, front["hydra"].err
    wanted = {"results.json", "loss.svg", "expert_load.svg", "sample.txt", "lightning_cli.yaml", "config_tree.log"}
    wanted |= {"checkpoints/last.ckpt", "checkpoints/best.ckpt", "csv/metrics.csv", ".hydra/overrides.yaml"}
    assert files_in(folder / "run") >= {*wanted, "train.log"}
    differing = front["hydra"].out.partition("differs from the defaults in ")[2].partition("training from step")[0]
    n, *rows = differing.splitlines()
    assert len(rows) == int(n.rstrip(":")) + 1 and any(row.split()[:1] == ["model.d_model"] for row in rows), differing
    assert any(name.startswith("tensorboard/events") for name in files_in(folder / "run"))


def test_run_from_its_file_has_the_same_figures_and_leaves_the_first_as_it_is(front: Doors, folder: Path) -> None:
    assert front["config"].code == 0, front["config"].err
    again = only(folder / "logs" / "train" / "cli")
    assert_same_figures(folder / "run", again, front["hydra"].out, front["config"].out)
    assert {"train/loss", "val/loss", "val/bits_per_byte", "train/expert_balance"} <= set(metrics_of(again))
    assert len(front["hydra"].files) > 10 and front["config"].files == front["hydra"].files
    assert files_in(again) >= {"results.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "csv/metrics.csv"}


def test_exported_file_holds_no_hydra_and_does_not_name_the_folder_of_its_run(front: Doors, folder: Path) -> None:
    for run in (folder / "run", only(folder / "logs" / "train" / "cli")):
        text = (run / "lightning_cli.yaml").read_text()
        assert front and "_target_" not in text and "${" not in text.replace("${run_dir}", "").replace("${now}", "")
        assert str(run) not in text and text.count("${run_dir}") >= 5, run
        written = yaml.safe_load(text)
        assert written["run_dir"] == f"{folder}/logs/train/cli/${{now}}" and written["weights_only"] is True
        assert (written["model"]["task"]["name"], written["data"]["data"]["name"]) == ("causal_lm", "text")
        assert written["model"]["model"]["attention"]["name"] == "gqa"


def test_mistake_at_the_cli_door_is_one_message(front: Doors) -> None:
    assert_one_message(front["another model"], "ckpt_path")


def test_printed_continuation_is_a_command_that_composes(front: Doors) -> None:
    (line,) = re.findall(r"^Continue: blockwright train (.+)$", front["hydra"].out, re.M)
    cfg = compose_config(shlex.split(line), output_dir="x")
    assert cfg.trainer.max_steps == 12 and cfg.model.attention.name == "gqa"
    assert Path(cfg.ckpt_path).name == "last.ckpt" and Path(cfg.ckpt_path).is_file()


@pytest.mark.slow
def test_each_mistake_at_the_cli_door_is_one_message(doors: Doors) -> None:
    for name, path in MISTAKES.items():
        assert_one_message(doors[name], path)


@pytest.mark.slow
def test_composing_door_gives_the_same_figures(doors: Doors, folder: Path) -> None:
    assert doors["compose"].code == 0, doors["compose"].err
    run = only(folder / "logs" / "compose" / "cli")
    assert_same_figures(folder / "run", run, doors["hydra"].out, doors["compose"].out)


@pytest.mark.slow
def test_run_that_is_repeated_resumed_or_measured_stays_as_it_is(doors: Doors) -> None:
    whole = doors["hydra"].files
    assert len(whole) > 10 and [name for name, door in doors.items() if door.files != whole] == []


@pytest.mark.slow
def test_validating_a_checkpoint_gives_the_figures_of_its_run(doors: Doors, folder: Path) -> None:
    wanted = {k: v for k, v in metrics_of(folder / "run").items() if k.startswith("val/")}
    during, found = logged(folder / "run", "val/loss"), metrics_of(folder / "validate")
    assert during[1] != during[2] == wanted["val/loss"]  # the last step's, on a part of the text and on all of it
    assert {k: v for k, v in found.items() if k.startswith("val/")} == wanted
    assert json.loads((folder / "validate" / "results.json").read_text())["steps"] == 6
    assert logged(folder / "validate", "val/loss") == [wanted["val/loss"]]
    assert re.search(rf"^validation loss +{wanted['val/loss']:.6g} ", doors["validate"].out, re.M)


@pytest.mark.slow
def test_testing_a_checkpoint_prints_and_keeps_its_figures_by_either_door(doors: Doors, folder: Path) -> None:
    assert doors["test"].code == doors["test only"].code == 0, doors["test only"].err
    found, other = metrics_of(folder / "test"), metrics_of(folder / "only")
    assert found["test/loss"] == other["test/loss"] > 0 and not any(name.startswith("val/") for name in found)
    assert other["val/loss"] == metrics_of(folder / "run")["val/loss"]
    assert re.search(rf"^test loss +{found['test/loss']:.6g} ", doors["test"].out, re.M)


@pytest.mark.slow
def test_predicting_writes_the_next_tokens_of_all_windows(doors: Doors, folder: Path) -> None:
    assert doors["predict"].code == 0, doors["predict"].err
    lines = list(map(json.loads, (folder / "predict" / "predictions.jsonl").read_text().splitlines()))
    pairs = [(t, p) for line in lines for t, p in zip(line["targets"], line["predicted"], strict=True)]
    right = sum(t == p for t, p in pairs)
    assert len(pairs) > 100 and 0 < right < len(pairs) and all(isinstance(line["text"], str) for line in lines)
    assert f"predicted right: {100 * right / len(pairs):.2f} % of {len(pairs)}" in doors["predict"].out


@pytest.mark.slow
def test_run_without_validation_says_what_it_does_not_measure_and_ends_well(doors: Doors, folder: Path) -> None:
    ended = doors["no validation"]
    assert ended.code == 0, ended.err
    said = [line for line in ended.err.splitlines() if line.startswith(("note:", "warning:"))]
    assert "callbacks.checkpoint.monitor=val/loss (data.corpus.val_fraction=0)" in said[0] and len(said) == 2
    assert "optimized_metric = 'val/accuracy'" in said[1]
    assert (folder / "sweep" / "0" / "checkpoints" / "last.ckpt").exists()
    assert metrics_of(folder / "sweep" / "0")["train/loss"] > 0  # a job's, without a report too
    assert "\r" not in ended.out + ended.err  # Lightning's own progress bar
    assert re.search(r"^train/loss +\d", ended.out, re.M)  # where no callback shows the figures


@pytest.mark.slow
def test_resumed_run_takes_the_settings_of_now_and_by_its_file_a_new_folder(doors: Doors, folder: Path) -> None:
    assert doors["resume"].code == doors["resume by config"].code == 0, doors["resume by config"].err
    rates = logged(folder / "on", "train/lr")
    assert len(rates) == len(logged(folder / "further", "train/lr")) == 2  # steps 7 and 8 of 8
    assert rates[0] > rates[-1] == pytest.approx(0.001)  # a tenth of 0.01, and not of the checkpoint's 0.005
    assert last_step(folder / "on") == last_step(folder / "further") == 8


@pytest.mark.slow
def test_debug_run_keeps_nothing(doors: Doors, folder: Path) -> None:
    assert doors["debug fdr"].code == 0 and not list((folder / "fdr").rglob("*.ckpt")), doors["debug fdr"].err


@pytest.mark.slow
def test_two_processes_train_what_one_does(small: list[str], train_py: TrainPy, tmp_path: Path) -> None:
    moving = ["model/gating=sigmoid_bias", "model.gating.bias_step=0.05", "trainer.accumulate_grad_batches=2"]
    moving += ["optimizer.ns_dtype=float32"]  # bfloat16 makes of sums in another order another choice of an expert
    for name in ("default", "ddp_sim"):
        done = train_py(*small, *moving, "data.batch_size=4", f"trainer={name}", f"hydra.run.dir={tmp_path}/{name}")
        assert done.returncode == 0, done.stderr
    one, two = (metrics_of(tmp_path / name) for name in ("default", "ddp_sim"))
    one, two = ({k: v for k, v in each.items() if not k.startswith("val_load/")} for each in (one, two))
    assert two == pytest.approx(one, rel=1e-4)  # the loads of validation count rows that fill up a batch, too
    files = (tmp_path / name / "checkpoints" / "last.ckpt" for name in ("default", "ddp_sim"))
    biases = [torch.load(f, weights_only=True)["state_dict"]["decoder.layers.1.ffn.gating.bias"] for f in files]
    assert torch.equal(*biases) and biases[0].abs().max() > 0
    assert len([p for p in (tmp_path / "ddp_sim").iterdir() if p.name.startswith(".hydra")]) == 1


@pytest.mark.slow
def test_cli_door_runs_two_processes(small: list[str], train_py: TrainPy, tmp_path: Path) -> None:
    done = train_py("fit", "--compose", *small, "trainer=ddp_sim", f"paths.log_dir={tmp_path}/logs")
    assert done.returncode == 0, done.stderr
    run = only(tmp_path / "logs" / "train" / "cli")  # one folder, though each process composed for itself
    assert metrics_of(run)["val/loss"] > 0
