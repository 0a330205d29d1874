"""Coefficients from published runs: ``python -m blockwright.plugins.planner.fitting`` prints coefficients.yaml.

Coefficients are fitted on the runs with ``fit: true`` of published.yaml by least squares of the logarithm
of (predicted tokens a second)/(measured), softly bounded, with a weak pull to where each starts, within bounds. Then
the speed of each other device is that which meets its one run with ``fit: device``. All other runs are held out.
"""

from __future__ import annotations

import functools
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.plugins.planner.hardware import PUBLISHED, Coefficients, Hardware, coefficients, hardware
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import Measured, measure
from blockwright.plugins.planner.step import Step, step
from blockwright.plugins.planner.table import markdown
from blockwright.registry import presets
from blockwright.registry.command import Parser, run_command
from blockwright.registry.errors import require
from blockwright.registry.limits import read_text

# start, least, most: what kernels are known to reach, before any run here was looked at
START: Mapping[str, tuple[float, float, float]] = {
    "dense": (0.62, 0.4, 0.8),
    "routed": (0.45, 0.2, 0.65),
    "scores": (0.45, 0.25, 0.7),
    "rows": (256.0, 64.0, 1024.0),
    "fp8": (1.45, 1.1, 1.8),
    "moved": (0.8, 0.2, 3.0),
    "launch_dense": (2e-4, 2e-5, 1e-3),
    "launch_routed": (6e-4, 6e-5, 3e-3),
    "tensor": (0.33, 0.05, 1.0),
    "context": (0.7, 0.05, 1.0),
    "exchange": (0.75, 0.1, 1.2),
    "gradients": (0.3, 0.05, 1.0),
    "gathered": (0.12, 0.02, 0.5),
}
PULL = 0.14  # weight of the logarithm of (coefficient)/(start)
LONGEST = 131_072  # tokens, to which the model is held
GENERATION = {"gb200": ["gb200", "gb300"]}  # devices that share a speed


@dataclass(frozen=True)
class Run:
    """A published run.

    Args:
        row: of published.yaml
        measured: its model
        tokens: that a GPU trained on in a second
    """

    row: dict[str, Any]
    measured: Measured
    tokens: float

    @property
    def job(self) -> Job:
        return Job(**{f.name: self.row[f.name] for f in fields(Job) if f.name in self.row})

    @property
    def layout(self) -> Layout:
        return Layout(**{f.name: self.row[f.name] for f in fields(Layout) if f.name in self.row})

    @property
    def used(self) -> str:
        """What the run is for: one of the groups that ``summary`` judges apart."""
        if "fit" in self.row:
            return "fitted" if self.row["fit"] is True else "its device's speed fitted"
        if not self.row["gpu"].startswith("h"):
            return "held out, not Hopper"
        if self.row["length"] > LONGEST:
            return "held out, beyond 128K"
        return "held out, ring attention" if self.row.get("ring") else "held out"

    @property
    def name(self) -> str:
        source = " ".join(filter(None, [self.row["source"], str(self.row.get("release", ""))]))
        return f"{self.row['model']} {self.row['gpus']} {self.row['gpu']} {self.row['length'] // 1024}K ({source})"

    def predicted(self, fitted: Coefficients, device: Hardware | None = None) -> Step:
        return step(self.measured, self.job, self.layout, device or hardware(self.row["gpu"]), fitted)


@functools.cache
def published() -> tuple[Run, ...]:
    """Every run of the file."""
    written: Any = registry.to_plain(read_text(PUBLISHED, PUBLISHED.name))
    return tuple(_run(row, _model(row["model"], written["models"])) for row in written["runs"])


def _run(row: dict[str, Any], measured: Measured) -> Run:
    flops = measured.training_flops(row["length"])
    read = {
        "tokens": lambda value: value,
        "tflops": lambda value: value * 1e12 / flops,
        "seconds": lambda value: row["batch"] * row["length"] / row["gpus"] / value,
        "hours": lambda value: 1e12 / (value * 1e3 * 3600),
    }
    (unit,) = read.keys() & row.keys()
    return Run(row, measured, read[unit](row[unit]))


_MODELS: dict[str, Measured] = {}


def _model(name: str, models: Mapping[str, Any]) -> Measured:
    if name not in _MODELS:
        composition = presets.inherited(models[name]) if name in models else presets.read(name)
        _MODELS[name] = measure(compose(composition, device="meta"))
    return _MODELS[name]


def error(run: Run, fitted: Coefficients, device: Hardware | None = None) -> float:
    """By how much the prediction is too fast, as a logarithm."""
    return math.log(run.predicted(fitted, device).tokens_per_second / run.tokens)


def fit(runs: Sequence[Run]) -> Coefficients:
    """The coefficients of the runs marked for it.

    Raises:
        ConfigError: SciPy is not installed
    """
    require("planner", "scipy", path="blockwright.plugins.planner.fitting")
    from scipy.optimize import least_squares

    chosen = [run for run in runs if run.row.get("fit") is True]
    start, least, most = (np.log([START[f.name][i] for f in fields(Coefficients)]) for i in range(3))

    def residuals(x: Any) -> list[float]:
        fitted = _coefficients(x)
        return [*(error(run, fitted) for run in chosen), *(PULL * (x - start))]

    found = least_squares(residuals, start, bounds=(least, most), loss="soft_l1", f_scale=0.05)
    return _coefficients(found.x)


def _coefficients(logarithms: Any) -> Coefficients:
    return Coefficients(*(math.exp(v) for v in logarithms))


def fit_speed(run: Run, fitted: Coefficients) -> float:
    """How fast a run's device must be for the model to meet it, by bisection."""
    least, most = 0.2, 5.0
    for _ in range(40):
        middle = math.sqrt(least * most)
        slow = error(run, fitted, replace(hardware(run.row["gpu"]), speed=middle)) < 0
        least, most = (middle, most) if slow else (least, middle)
    return least


def fitted_text(runs: Sequence[Run]) -> str:
    """The file of coefficients."""
    found = _rounded(fit(runs))
    speed: dict[str, float] = {}
    for run in (run for run in runs if run.row.get("fit") == "device"):
        speed |= dict.fromkeys(GENERATION.get(run.row["gpu"], [run.row["gpu"]]), float(f"{fit_speed(run, found):.3g}"))
    lines = [f"  {name}: {value:g}" for name, value in asdict(found).items()]
    speeds = [f"  {name}: {value:g}" for name, value in speed.items()]
    head = "# Written by python -m blockwright.plugins.planner.fitting from published.yaml. Meanings: hardware.py"
    return "\n".join([head, "coefficients:", *lines, "speed:  # against the H100", *speeds, ""])


def _rounded(found: Coefficients) -> Coefficients:
    return Coefficients(**{name: float(f"{value:.4g}") for name, value in asdict(found).items()})


@dataclass(frozen=True)
class Judged:
    """A published run beside what the model says of it, in tokens a second and GPU."""

    run: Run
    predicted: float

    @property
    def used(self) -> str:
        return self.run.used

    @property
    def off(self) -> float:
        """Too fast by this fraction."""
        return self.predicted / self.run.tokens - 1


def judgement() -> list[Judged]:
    """Every published run under the coefficients of the file."""
    fitted = coefficients()
    return [Judged(run, run.predicted(fitted).tokens_per_second) for run in published()]


def mean_error(rows: Sequence[Judged]) -> float:
    return sum(abs(row.off) for row in rows) / len(rows)


def summary(rows: Sequence[Judged]) -> list[str]:
    """Errors of each group of runs, in words."""
    groups: dict[str, list[Judged]] = {}
    for row in rows:
        groups.setdefault(row.used, []).append(row)
    return [
        f"{used}: {len(found)} runs, {mean_error(found):.1%} off on average, "
        f"median {statistics.median(abs(row.off) for row in found):.1%}, worst {max(abs(row.off) for row in found):.1%}"
        for used, found in groups.items()
    ]


def main(arguments: Sequence[str]) -> None:
    """Print the file of coefficients; with ``--table``, what the page shows of the published runs."""
    parser = Parser(prog="python -m blockwright.plugins.planner.fitting", description=__doc__)
    parser.add_argument("--table", action="store_true", help="print what the page shows of the published runs")
    if parser.parse_args(arguments).table:
        rows = judgement()
        print(markdown([(j.run.name, j.used, j.run.tokens, j.predicted) for j in rows], summary(rows)), end="")
    else:
        print(fitted_text(published()), end="")


if __name__ == "__main__":
    sys.exit(run_command(main))
