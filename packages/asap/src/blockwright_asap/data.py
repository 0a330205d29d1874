"""Real rollouts as training data: windows of features and of labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blockwright import ConfigError, DataModule, register
from blockwright_asap import labels, learned
from blockwright_asap.replay import SECOND, WARM_UP, features, of_rollouts, replay
from blockwright_asap.robot import NQ
from blockwright_asap.study import Settings, Study, alone
from blockwright_asap.world import simulators

Count = Annotated[int, Ge(1)]
DRIFTS, LOST = 72, 0.15  # replays that are labelled the way back; m or rad off, from where there is none


@register("data", "robot_rollouts")
class RobotRollouts(DataModule):
    """Transitions of the real robot: ``features`` [B,T,17] and ``labels`` [B,T,width], both standardised.

    What it needs (a policy, its rollouts, identification) is made in ``folder`` if it is not there: about a minute.

    Args:
        folder: of the study
        seed: of the study and of the windows
        gap: what makes the real robot differ: parameters, structure, both, redrawn (another robot in each episode)
        base: the simulator that is corrected: ``sim``, ``sysid`` (identified) or ``narrow`` (within the paper's bounds)
        corrects: ``action``: labels are Δa (labels.py); ``state``: what the simulator's state misses (delta dynamics)
        history: control steps before the present one that a window holds
        prompt: measured steps of the same robot that stand before a window, from any earlier time: what it is like
        batch_size: windows of a batch over all processes
        iterations, robots, episodes, held_out: of the study
        drift: finished runs of this experiment. The simulator corrected by each drifts for a second, and the way back
            to what was measured is labelled too, as DAgger does: labels for many steps
    """

    def __init__(
        self,
        folder: str,
        seed: int = 0,
        gap: str = "both",
        base: Literal["sim", "sysid", "narrow"] = "sim",
        corrects: Literal["action", "state"] = "action",
        history: Annotated[int, Ge(0)] = 15,
        prompt: Annotated[int, Ge(0)] = 0,
        batch_size: Count = 16,
        iterations: Count = 120,
        robots: Count = 96,
        episodes: Count = 12,
        held_out: Count = 6,
        drift: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not isinstance(prompt, int) or not 0 <= prompt <= WARM_UP:
            rule = f"counts the control steps measured before a replay, 0 to {WARM_UP}"
            raise ConfigError("data.prompt", prompt, rule, f"Write data.prompt={WARM_UP}")
        if not isinstance(history, int) or not 0 <= history <= 99 - prompt:
            rule = f"counts control steps of an episode of 100, 0 to {99 - prompt} behind the prompt"
            raise ConfigError("data.history", history, rule, "Write data.history=15")
        if drift and (corrects != "action" or prompt):
            rule = "labels Δa alone, and no windows with a prompt"
            raise ConfigError(
                "data.drift", list(drift), rule, "Leave it out, or set data.corrects=action data.prompt=0"
            )
        self.folder, self.seed, self.base, self.corrects = Path(folder), seed, base, corrects
        self.history, self.prompt, self.batch_size = history, prompt, batch_size
        self.drift = [Path(run) for run in drift]
        for run in self.drift:
            if not learned.checkpoint(run).is_file():
                rule, remedy = "holds no checkpoint", "Name the folder of a finished run of experiment=asap_delta"
                raise ConfigError("data.drift", str(run), rule, remedy)
        self.settings = Settings(seed, gap, iterations, robots, episodes, held_out)
        self.sequence_length = prompt + history + 1
        self.statistics: dict[str, Tensor] = {}
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}
        self._batches = 0

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the data."""
        return {"corrects": self.corrects, "history": self.history, "prompt": self.prompt}

    @property
    def study(self) -> Study:
        return Study(self.folder, self.settings)

    def prepare_data(self) -> None:
        task = self.trainer.lightning_module if self.trainer else None
        if task is not None and "labels" not in getattr(task, "reads", ()):
            rule = "reads other batches than rollouts of a robot give"
            raise ConfigError("task", type(task).__name__, rule, "Write task=asap_correct")
        study = self.study
        with alone(study.folder):
            for held_out in (False, True):
                study.labelled(self.base, self.corrects, held_out)

    def setup(self, stage: str | None = None) -> None:
        study = self.study
        real, held_out = (study.labelled(self.base, self.corrects, later) for later in (False, True))
        self._parts = {
            "train": _by_robot(of_rollouts(study.real), real),
            "val": _by_robot(of_rollouts(study.held_out), held_out),
        }
        mean, std = self._parts["train"][0].flatten(0, 1).mean(0), self._parts["train"][0].flatten(0, 1).std(0) + 1e-3
        self.statistics = {"mean": mean, "std": std, "scale": self._parts["train"][1].flatten(0, 1).std(0) + 1e-4}
        for number, run in enumerate(self.drift):
            self._add(*self._way_back(study, learned.read(run), number))

    def _way_back(self, study: Study, correction: learned.Learned, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Features and labels along replays of a second in the corrected simulator, of those that were not lost."""
        rng, real, gap = np.random.default_rng([self.seed, number]), study.real, study.simulator(self.base)
        steps, robots = real.commands.shape[:2]
        t, i = rng.integers(0, steps - SECOND + 1, DRIFTS), rng.integers(0, robots, DRIFTS)
        states = np.stack([real.states[t + k, i] for k in range(SECOND + 1)])
        commands = np.stack([real.commands[t + k, i] for k in range(SECOND)])
        correction.forget(np.ones(DRIFTS, bool))
        _, drifted = replay(simulators(DRIFTS, gap), states, commands, correction)
        seen = np.concatenate([states[:1], drifted[:-1]])
        off = np.abs(drifted[..., 1:3] - states[1:][..., 1:3]).max(-1) > LOST
        kept = ~off.any(0)
        found = labels.delta_actions(seen[:, kept], commands[:, kept], states[1:][:, kept], gap)
        return features(seen[:, kept, :NQ], seen[:, kept, NQ:], commands[:, kept]), found.delta

    def _add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Append rollouts that are shorter: the measured ones are cut to their length."""
        length = len(x)
        more = _by_robot(x, y)
        halves = [torch.cat(part.split(length, dim=1)[: part.shape[1] // length]) for part in self._parts["train"]]
        self._parts["train"] = (torch.cat([halves[0], more[0]]), torch.cat([halves[1], more[1]]))

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self._loader("train", _Numbers(self._per_epoch, self._consumed))

    def val_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        robots = range(len(self._parts["val"][0]))
        return self._loader("val", [list(robots)[i : i + 32] for i in range(0, len(robots), 32)])

    def test_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return self.val_dataloader()

    def _loader(self, part: str, order: Any) -> DataLoader[dict[str, Tensor]]:
        lengths = (self.prompt, self.history + 1)
        data = Windows(*self._parts[part], self.statistics, lengths, self.seed, self._rows(part))
        return DataLoader(data, sampler=order, batch_size=None)

    def _rows(self, part: str) -> tuple[int, int, int]:
        """(windows of a batch, rank, ranks) of training; 0 windows for whole rollouts."""
        sharing = self.trainer.distributed_sampler_kwargs if self.trainer else None
        rank, ranks = (sharing["rank"], sharing["num_replicas"]) if sharing else (0, 1)
        if self.batch_size % ranks:
            rule = f"counts windows over all processes, and {ranks} of them share a batch evenly"
            raise ConfigError("data.batch_size", self.batch_size, rule, f"Write a multiple of {ranks}")
        return (self.batch_size if part == "train" else 0), rank, ranks

    @property
    def _per_epoch(self) -> int:
        rows, steps, _ = self._parts["train"][0].shape
        return max(1, rows * steps // (self.batch_size * (self.history + 1)))

    def _consumed(self) -> int:
        if self.trainer is None:
            return self._batches
        return self.trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._consumed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._batches = state_dict["batches"]


class Windows(Dataset[dict[str, Tensor]]):
    """Batches by number: of training, windows drawn by a function of the seed and the number; else whole rollouts.

    Args:
        x, y: features and labels of rollouts [N,T,·]
        statistics: to standardise them by
        lengths: of the prompt and of the windows
        seed: of the draws
        rows: windows of a batch, rank, ranks
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        statistics: dict[str, Tensor],
        lengths: tuple[int, int],
        seed: int,
        rows: tuple[int, int, int],
    ) -> None:
        self.x, self.y = (x - statistics["mean"]) / statistics["std"], y / statistics["scale"]
        (self.prompt, self.length), self.seed, self.rows = lengths, seed, rows

    def __getitem__(self, item: int | list[int]) -> dict[str, Tensor]:
        size, rank, ranks = self.rows
        if isinstance(item, list):
            mine = item[rank::ranks]
            batch = self._whole(mine or item[:1])  # a rank without a robot takes the steps of the others, unscored
            return batch if mine else {**batch, "labels": batch["labels"][:, :0]}
        rng = np.random.default_rng([self.seed, item])
        robots = rng.integers(0, len(self.x), size)
        starts = rng.integers(self.prompt, self.x.shape[1] - self.length + 1, size)
        earlier = rng.integers(0, starts - self.prompt + 1) if self.prompt else starts
        robot, start, prompt = (torch.from_numpy(each)[rank::ranks, None] for each in (robots, starts, earlier))
        own, before = start + torch.arange(self.length), prompt + torch.arange(self.prompt)
        return _batch(torch.cat([self.x[robot, before], self.x[robot, own]], 1), self.y[robot, own])

    def _whole(self, robots: list[int]) -> dict[str, Tensor]:
        """Rollouts cut into windows, one after the other, each behind the beginning of its rollout."""
        count = (self.x.shape[1] - self.prompt) // self.length
        end = self.prompt + count * self.length

        def cut(whole: Tensor) -> Tensor:
            return whole[robots, self.prompt : end].unflatten(1, (count, self.length)).flatten(0, 1)

        prompts = self.x[robots, : self.prompt].repeat_interleave(count, 0)
        return _batch(torch.cat([prompts, cut(self.x)], 1), cut(self.y))


def _batch(features: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``tokens`` are all 0: a step of the robot is a token, for counts and for gates that read ids."""
    return {"tokens": torch.zeros(features.shape[:2], dtype=torch.int64), "features": features, "labels": labels}


class _Numbers:
    """Numbers of the batches of an epoch that are still to come."""

    def __init__(self, per_epoch: int, consumed: Any) -> None:
        self.per_epoch, self.consumed = per_epoch, consumed

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[int]:
        start = self.consumed()
        return iter(range(start, (start // self.per_epoch + 1) * self.per_epoch))


def _by_robot(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    """[T,N,·] → [N,T,·], as floats."""
    first, second = (torch.from_numpy(each.transpose(1, 0, 2)).float() for each in (x, y))
    return first, second
