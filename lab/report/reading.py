"""Read a sweep from disk: its plan, its runs and their results.

A plan of an ablation names its arms. In any other sweep the runs whose overrides differ only in the seed are one arm,
and the first arm is the baseline.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockwright.lab.sweep.damage import damage_of
from blockwright.lab.sweep.direction import described, maximizes
from blockwright.lab.sweep.plan import overrides_of
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.folder import read_json, read_yaml
from blockwright.training.figure import Figure
from blockwright.training.jobs import RESULTS, results_of

PLAN = "plan.json"
UNFINISHED = "unfinished"


@dataclass(frozen=True)
class Run:
    """One job.

    Args:
        job: its number, which is its folder's name
        folder: of the run; None if it has not begun
        overrides: its own
        seed: 0 if no override sets it
        lr: its learning rate, if the plan sweeps it
        status: completed, failed, diverged, unfinished or unreadable
        reason: why it is lost; else empty
        metrics: the last value of everything logged
        figures: params, active_params, flops (training, a token), cache_bytes (a token, fp32), as far as known
        curves: contents of ``curves.json``
        fit_seconds: of training
    """

    job: int
    folder: Path | None
    overrides: tuple[str, ...]
    seed: int = 0
    lr: float | None = None
    status: str = UNFINISHED
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, Any] = field(default_factory=dict)
    fit_seconds: float | None = None

    def value(self, metric: str) -> float | None:
        """Its final figure; None if it is lost."""
        found = self.metrics.get(metric) if self.status == "completed" else None
        return found if found is not None and math.isfinite(found) else None

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
    def unit(self) -> str:
        """Of its metric, or nothing."""
        return self.unit_of(self.metric)

    def unit_of(self, name: str) -> str:
        return self.figures[name].unit if name in self.figures else ""

    @property
    def runs(self) -> list[Run]:
        return sorted((run for arm in self.arms for run in arm.runs), key=lambda run: run.job)


def read(
    directory: Path, baseline: str | None = None, metric: str | None = None, direction: str | None = None
) -> Sweep:
    """Read a sweep's folder.

    Args:
        directory: of the sweep
        baseline: name of the arm to compare with; None for the plan's, or the first
        metric: to compare; None for the sweep's own
        direction: ``minimize`` or ``maximize``, of a metric that no run describes

    Raises:
        ConfigError: there is nothing to report: no folder, no sweep, no finished job, no such arm or metric; or which
            way the metric is better is not known, or contradictory
    """
    _check_folder(directory)
    plan = _plan(directory)
    runs = _runs(directory, plan)
    if not runs:
        rule = "holds no jobs (folders 0, 1, 2 …)" if any(directory.iterdir()) else "is empty"
        raise ConfigError("DIR", str(directory), f"{rule}, so it is not a sweep's folder", WHERE)
    arms = _planned_arms(plan, runs) if plan.get("arms") and plan.get("jobs") else _found_arms(runs)
    found, planned, kind = _aim(directory, plan)
    planned = (planned[0], None) if metric not in (None, found) else planned  # it is for another metric
    metric = metric or found
    _check_any_figure(directory, runs, metric)
    figures = _described(directory, runs)
    maximize = maximizes("--metric", metric, figures.get(metric), ("--direction", direction), planned)
    sweep = Sweep(
        directory,
        kind,
        str(plan.get("name") or directory.resolve().name),
        plan.get("command", ""),
        metric,
        maximize,
        tuple(arms),
        _baseline(plan, arms, baseline),
        tuple(plan.get("also", ())),
        figures,
    )
    return sweep


WHERE = "Name the folder of a sweep or of `blockwright ablate`: logs/*/multiruns/… or logs/ablation/*/…"


def _check_folder(directory: Path) -> None:
    if not directory.is_dir():
        near = [p.name for p in directory.parent.iterdir() if p.is_dir()] if directory.parent.is_dir() else []
        hint = did_you_mean(directory.name, near) if near and len(near) <= 20 else ""
        hint = hint if hint.startswith("Did you mean") else ""
        raise ConfigError("DIR", str(directory), "is not a folder", f"{hint}. {WHERE}" if hint else WHERE)
    if (not (directory / PLAN).exists() and (directory / ".hydra").is_dir()) or (directory / "results.json").exists():
        rule = "is the folder of one run, but a report compares several"
        raise ConfigError("DIR", str(directory), rule, f"Its own figures are in results.json. {WHERE}")


def _plan(directory: Path) -> dict[str, Any]:
    file = directory / PLAN
    if not file.exists():
        return {}
    try:
        plan = read_json(directory, PLAN)
        if not isinstance(plan, dict):
            raise ValueError("it is not a mapping")
        if wrong := damage_of(plan):
            raise ValueError(wrong)
        return plan
    except (ValueError, OSError) as error:
        rule = f"cannot be read ({error})"
        raise ConfigError("DIR", str(file), rule, "Remove it: the runs beside it are reported without a plan") from None


def _described(directory: Path, runs: Sequence[Run]) -> dict[str, Figure]:
    """What the runs say of their figures."""
    folders = [run.folder for run in runs if run.folder is not None and run.status == "completed"]
    return described(filter(None, map(results_of, folders)), str(directory))


def _aim(directory: Path, plan: Mapping[str, Any]) -> tuple[str, tuple[str, str | None], str]:
    """The sweep's metric, where its direction is written with what is, and the kind of sweep."""
    if "metric" in plan:
        return plan["metric"], (f"direction of {directory / PLAN}", plan.get("direction")), plan.get("kind", "grid")
    try:
        written = read_yaml(directory, "multirun.yaml")
    except ConfigError:  # none, or an incomplete file
        written = None
    metric, sweeper = _within(written, "optimized_metric"), _within(written, "hydra", "sweeper")
    kind, way = "search" if "optuna" in str(_within(sweeper, "_target_")) else "grid", _within(sweeper, "direction")
    said = f"direction of {directory / 'multirun.yaml'}", None if way is None else str(way)
    return str(metric or "val/loss"), said, plan.get("kind", kind)


def _within(value: Any, *keys: str) -> Any:
    """A value in nested mappings; None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check_any_figure(directory: Path, runs: Sequence[Run], metric: str) -> None:
    if any(run.value(metric) is not None for run in runs):
        return
    logged = {name for run in runs if run.status == "completed" for name in run.metrics}
    if logged and metric not in logged:
        raise ConfigError("--metric", metric, "no run of the sweep logged it", did_you_mean(metric, logged))
    states = Counter(f"without a finite {metric}" if run.status == "completed" else run.status for run in runs)
    counted = ", ".join(f"{count} {status}" for status, count in states.items())
    reasons = Counter(run.reason.splitlines()[0][:200] for run in runs if run.reason and run.status != UNFINISHED)
    why = f"; most often: {reasons.most_common(1)[0][0]}" if reasons else ""
    remedy = f"Resume it: blockwright sweep resume {directory}" if UNFINISHED in states else "Fix that, and retry"
    raise ConfigError("DIR", str(directory), f"none of its {len(runs)} jobs has a figure ({counted}{why})", remedy)


# --- runs -------------------------------------------------------------------------------------------------------------


def _runs(directory: Path, plan: Mapping[str, Any]) -> list[Run]:
    jobs = {int(job["job"]): job for job in plan.get("jobs") or []}
    folders = {int(p.name): p for p in directory.iterdir() if p.name.isdigit() and p.is_dir()}
    return [_run(number, folders.get(number), jobs.get(number, {})) for number in sorted({*jobs, *folders})]


def _run(number: int, folder: Path | None, job: Mapping[str, Any]) -> Run:
    overrides = tuple(job.get("overrides") or (overrides_of(folder) if folder else ()))
    seed, lr = job.get("seed"), job.get("lr")
    seed = _seed(overrides) if seed is None else int(seed)
    if folder is None:
        return Run(number, None, overrides, seed, lr, UNFINISHED, "has not begun")
    status, reason, results = _results(folder)
    curves = _json(folder / "curves.json")
    curves = _whole(curves) if isinstance(curves, dict) else {}
    return Run(
        number,
        folder,
        overrides,
        seed,
        lr,
        status,
        reason,
        results.get("metrics", {}),
        _figures(results, curves),
        curves,
        results.get("fit_seconds"),
    )


def _seed(overrides: Sequence[str]) -> int:
    written = [o.partition("=")[2] for o in overrides if o.lstrip("+").partition("=")[0] == "seed"]
    return int(written[-1]) if written and written[-1].lstrip("-").isdigit() else 0


def _json(file: Path) -> Any:
    try:
        return read_json(file.parent, file.name)
    except ConfigError:
        return None


def _results(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """Status, reason and document of a job."""
    file = folder / RESULTS
    if not file.exists():
        return UNFINISHED, "no results.json: it is still running, or was stopped", {}
    results = results_of(folder)
    if results is None:
        return "unreadable", "its results.json cannot be read", {}
    return results["status"], results.get("reason", ""), results


def _whole(curves: Mapping[str, Any]) -> dict[str, Any]:
    """Curves without unexpected contents, which must not make the report fail."""
    kept: dict[str, Any] = {k: v for k, v in curves.items() if isinstance(v, int | float | dict)}
    for name in ("train", "val"):
        points = curves.get(name)
        pairs = [p for p in points if isinstance(p, list) and len(p) == 2] if isinstance(points, list) else []
        kept[name] = [p for p in pairs if all(isinstance(n, int | float) for n in p)]
    return kept


def _figures(results: Mapping[str, Any], curves: Mapping[str, Any]) -> dict[str, float]:
    found = {
        "params": results.get("parameters"),
        "active_params": results.get("active_parameters"),
        "flops": curves.get("flops_per_token"),
        "cache_bytes": curves.get("cache_bytes_per_token"),
    }
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


# --- arms -------------------------------------------------------------------------------------------------------------


def _planned_arms(plan: Mapping[str, Any], runs: Sequence[Run]) -> list[Arm]:
    named = {int(job["job"]): job.get("arm") for job in plan.get("jobs") or []}
    return [
        Arm(
            str(arm["name"]),
            tuple(arm.get("overrides") or ()),
            tuple(run for run in runs if named.get(run.job) == arm["name"]),
            arm.get("figures") or {},
            arm.get("match"),
            arm.get("against"),
        )
        for arm in plan["arms"]
    ]


def _found_arms(runs: Sequence[Run]) -> list[Arm]:
    """Group runs that differ only in the seed into arms, in the order of their start."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        own = tuple(o for o in run.overrides if o.lstrip("+").partition("=")[0] != "seed")
        groups.setdefault(own, []).append(run)
    shared = set.intersection(*(set(own) for own in groups))
    different = [[o for o in own if o not in shared] for own in groups]
    names = _names(different)
    return [Arm(n, tuple(own), tuple(r)) for n, own, r in zip(names, different, groups.values(), strict=True)]


def _names(different: Sequence[Sequence[str]]) -> list[str]:
    """Short names of the arms: ``mla`` for model/attention=mla where nothing else differs, else d_ff=64 lr=0.1."""
    keys = {o.lstrip("+").partition("=")[0] for own in different for o in own}
    last = Counter(key.replace("/", ".").rpartition(".")[2] for key in keys)
    names = []
    for own in different:
        words = []
        for override in own:
            key, _, value = override.lstrip("+").partition("=")
            short = key.replace("/", ".").rpartition(".")[2]
            alone = len(keys) == 1 and "/" in key
            words.append(value if alone else f"{short if last[short] == 1 else key}={value}")
        names.append(" ".join(words) or "as configured")
    return names if len(set(names)) == len(names) else [" ".join(own) or "as configured" for own in different]


def _baseline(plan: Mapping[str, Any], arms: Sequence[Arm], asked: str | None) -> int:
    names = [arm.name for arm in arms]
    if asked is not None:
        if asked not in names:
            raise ConfigError("--baseline", asked, "no arm of the sweep has this name", did_you_mean(asked, names))
        return names.index(asked)
    marked = [str(arm["name"]) for arm in plan.get("arms") or [] if arm.get("baseline")]
    return names.index(marked[0]) if marked else 0
