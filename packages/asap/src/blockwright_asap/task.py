"""The task: learn a correction of the simulator by regression, with Blockwright's own command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import smooth_l1_loss

from blockwright import ConfigError, Figure, Scored, Setup, Task, register
from blockwright_asap import learned, replay
from blockwright_asap.data import RobotRollouts
from blockwright_asap.labels import BOUND
from blockwright_asap.robot import NU
from blockwright_asap.study import Study, alone

REPLAYS = {"0.25": "replay_quarter", "0.5": "replay_half", "1.0": "replay_1s"}  # seconds → figure, mm


@register("task", "asap_correct")
class Correct(Task):
    """Huber loss between the decoder's corrections and the labels, both in standard deviations of the labels.

    Labels are of the last steps: what stands before them is a prompt.

    Validation replays held-out real rollouts in the corrected simulator: ``val/replay_1s`` is the mean distance of
    bodies (E_g-mpjpe) over a second, mm.
    """

    figures: ClassVar[tuple[Figure, ...]] = (
        Figure("loss", "a label, in standard deviations", "less", ("train", "val", "test")),
        *(Figure(name, "mm", "less") for name in REPLAYS.values()),
    )
    reads: ClassVar[tuple[str, ...]] = ("tokens", "features", "labels")

    mean: Tensor
    std: Tensor
    scale: Tensor

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        if self.model_config["vocab_size"] < learned.NEEDED:
            rule = f"an embedding for each feature is needed, {learned.NEEDED} of them"
            remedy = f"Set model.vocab_size={learned.NEEDED}"
            raise ConfigError("model.vocab_size", self.model_config["vocab_size"], rule, remedy)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, RobotRollouts):
            rule = "this task learns from rollouts of a robot"
            raise ConfigError("data", type(data).__name__, rule, "Write data=robot_rollouts")
        for name, value in data.statistics.items():
            self.register_buffer(name, value.clone())
        self.save_hyperparameters({"asap": data.facts})

    def objective(self, batch: dict[str, Tensor], stage: str) -> Scored:
        labels = batch["labels"]
        said, routings = learned.predict(self.model, batch["features"], labels.shape[-1])
        total = smooth_l1_loss(said[:, said.shape[1] - labels.shape[1] :].float(), labels, reduction="sum")
        return Scored(total, self.counts(batch)["total"], routings=routings)

    def counts(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"]
        return {"total": torch.tensor(labels.numel(), device=labels.device, dtype=torch.int64)}

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            self._replay("val")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._replay("test")

    def _replay(self, stage: str) -> None:
        """Log the errors of open-loop replays; every rank computes the same."""
        data: RobotRollouts = self.trainer.datamodule  # type: ignore[attr-defined]
        statistics = {name: getattr(self, name).cpu() for name in ("mean", "std", "scale")}
        limit = torch.full((NU,), BOUND, dtype=torch.float32) if data.corrects == "action" else 4 * statistics["scale"]
        correction = learned.Learned(self.model, statistics, data.facts, limit.numpy())
        study = data.study
        found = replay.open_loop(study.held_out, study.simulator(data.base), correction)
        for seconds, name in REPLAYS.items():
            self.log(f"{stage}/{name}", float(found[seconds]["g_mpjpe"]))  # type: ignore[index]


QUIET = (
    *("logger=none", "test=false", "callbacks.report.sample_tokens=0"),
    *("callbacks.throughput=null", "auto_resume=true"),
)


def train(
    study: Study, base: str, corrects: str = "action", drift: Sequence[Path] = (), changes: Sequence[str] = ()
) -> Path:
    """Run ``experiment=asap_delta``, unless its folder holds the finished run; one that was killed is continued.

    Args:
        study: whose rollouts are learnt from
        base, corrects, drift: as in ``data``
        changes: further overrides, such as ``model/attention=gqa``

    Returns:
        the run's folder

    Raises:
        RuntimeError: the command failed; its last lines
    """
    name = "_".join(["delta", base, corrects, *([f"round{len(drift)}"] if drift else []), *map(_plain, changes)])
    folder = study.folder / name
    with alone(study.folder, name):
        return _trained(study, folder, base, corrects, drift, changes)


def _trained(
    study: Study, folder: Path, base: str, corrects: str, drift: Sequence[Path], changes: Sequence[str]
) -> Path:
    settings, name, results = study.settings, folder.name, folder / "results.json"
    if results.exists() and json.loads(results.read_text())["status"] == "completed":
        return folder
    given = {
        "seed": settings.seed,
        "task_name": name,
        "hydra.run.dir": f"'{folder}'",
        "data.folder": f"'{study.folder}'",
        **{f"data.{key}": getattr(settings, key) for key in ("gap", "iterations", "robots", "episodes", "held_out")},
        "data.base": base,
        "data.corrects": corrects,
        "data.drift": f"[{','.join(repr(str(run)) for run in drift)}]",
    }
    words = [f"{key}={value}" for key, value in given.items()]
    command = [sys.executable, "-m", "blockwright", "train", "experiment=asap_delta", *words, *QUIET, *changes]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("\n".join([f"{name} failed:", *done.stderr.splitlines()[-8:]]))
    return folder


def _plain(override: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in override.partition("/")[2] or override)
