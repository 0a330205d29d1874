"""A sweep as a report sees it: its arms and their runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockwright.training.figure import Figure
from blockwright.training.result import Result

LONGEST_TITLE = 60  # letters of the values in a title


@dataclass(frozen=True)
class Run:
    """One job.

    Args:
        job: its number, which is its folder's name
        folder: of the run; None if it has not begun
        overrides: its own
        seed: 0 if no override sets it
        lr: its learning rate, if the plan sweeps it
        result: how it ended, and its figures
        curves: contents of ``curves.json``
    """

    job: int
    folder: Path | None
    overrides: tuple[str, ...]
    seed: int
    lr: float | None
    result: Result
    curves: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, float]:
        """params, active_params, flops (training, per token), cache_bytes (per token, fp32), as far as known."""
        known = {
            "params": self.result.parameters,
            "active_params": self.result.active_parameters,
            "flops": self.curves.get("flops_per_token"),
            "cache_bytes": self.curves.get("cache_bytes_per_token"),
        }
        return {name: value for name, value in known.items() if isinstance(value, int | float)}

    def loss_over_tokens(self, name: str = "val") -> list[tuple[float, float]]:
        """(tokens, loss) of its validations, or of ``train``."""
        tokens = self.curves.get("tokens_per_step")
        return [(step * tokens, loss) for step, loss in self.curves.get(name, [])] if tokens else []


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: of the arm
        overrides: that define it
        runs: its jobs: seeds, and learning rates where those are swept
        figures: from the plan; empty without one
        match: from the plan: how it was matched to the baseline
        against: from the plan: name of the arm that it is compared with; None for the baseline
    """

    name: str
    overrides: tuple[str, ...]
    runs: tuple[Run, ...]
    figures: Mapping[str, float] = field(default_factory=dict)
    match: Mapping[str, Any] | None = None
    against: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A sweep; ``arms[baseline]`` is the baseline, ``also`` are further figures to show, ``figures`` the units and
    directions that its runs give, by name."""

    directory: Path
    kind: str
    name: str
    command: str
    metric: str
    maximize: bool
    arms: tuple[Arm, ...]
    baseline: int
    also: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Of an ablation its name; else the settings in which its arms differ: a sweep's name is its task's."""
        settings = [dict(o.lstrip("+").partition("=")[::2] for o in arm.overrides) for arm in self.arms]
        keys = dict.fromkeys(key for each in settings for key in each)
        different = [key for key in keys if len({each.get(key) for each in settings}) > 1]
        if self.kind == "ablation" or not different:
            return self.name
        names = ", ".join(key.replace("/", ".").rpartition(".")[2] for key in different)
        values = ", ".join(arm.name.rpartition("=")[2] for arm in self.arms)
        return f"{names}: {values}" if len(different) == 1 and len(values) <= LONGEST_TITLE else names

    @property
    def unit(self) -> str:
        """Of its metric, or nothing."""
        return self.unit_of(self.metric)

    def unit_of(self, name: str) -> str:
        return self.figures[name].unit if name in self.figures else ""

    @property
    def runs(self) -> list[Run]:
        return sorted((run for arm in self.arms for run in arm.runs), key=lambda run: run.job)
