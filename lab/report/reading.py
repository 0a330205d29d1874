"""Read a sweep from disk: its plan, its runs and their results.

A plan of an ablation names its arms. In any other sweep the runs whose overrides differ only in the seed are one arm,
and the first arm is the baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blockwright.lab.report.sweep import Arm, Design, Run, Sweep
from blockwright.lab.statistics.tuning import COMPARE, Aim
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep.plan import damage_of, overrides_of
from blockwright.lab.sweep.table import described, maximizes
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.folder import read_json, read_yaml
from blockwright.registry.reading import keys
from blockwright.registry.reading import read as read_settings
from blockwright.training.result import RESULTS, UNFINISHED, Result

# --- the arms of a sweep: those of its plan, or groups of runs that differ only in the seed ---------------------------


def arms_of_plan(plan: Mapping[str, Any], runs: Sequence[Run]) -> list[Arm]:
    """The arms that a plan names, with their runs."""
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


def grouped(runs: Sequence[Run]) -> list[Arm]:
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


def baseline_of(plan: Mapping[str, Any], arms: Sequence[Arm], asked: str | None) -> int:
    """The place of the baseline among the arms.

    Args:
        plan: of the sweep, which may mark one
        arms: of the sweep
        asked: its name, on the command line

    Raises:
        ConfigError: no arm has this name
    """
    names = [arm.name for arm in arms]
    if asked is not None:
        if asked not in names:
            raise ConfigError("--baseline", asked, "no arm of the sweep has this name", did_you_mean(asked, names))
        return names.index(asked)
    marked = [str(arm["name"]) for arm in plan.get("arms") or [] if arm.get("baseline")]
    return names.index(marked[0]) if marked else 0


PLAN = "plan.json"
GRID = "grid"
KINDS = (GRID, "search", "ablation")  # that have this report


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
    if (kind := plan.get("kind", GRID)) not in KINDS:
        remedy = f"Write blockwright {kind} {directory}"
        raise ConfigError("DIR", str(directory), f"holds a {kind}, which has a report of its own", remedy)
    jobs = {int(job["job"]): job for job in plan.get("jobs") or []}
    folders = {int(p.name): p for p in directory.iterdir() if p.name.isdigit() and p.is_dir()}
    runs = [_run(number, folders.get(number), jobs.get(number, {})) for number in sorted({*jobs, *folders})]
    if not runs:
        rule = "holds no jobs (folders 0, 1, 2 …)" if any(directory.iterdir()) else "is empty"
        raise ConfigError("DIR", str(directory), f"{rule}, so it is not a sweep's folder", WHERE)
    sides = arms_of_plan(plan, runs) if plan.get("arms") and plan.get("jobs") else grouped(runs)
    found, planned, kind = _aim(directory, plan)
    planned = (planned[0], None) if metric not in (None, found) else planned  # it is for another metric
    metric = metric or found
    _check_any_figure(directory, runs, metric)
    # The figures that the runs describe
    figures = described((run.result for run in runs if run.result.status == "completed"), str(directory))
    maximize = maximizes("--metric", metric, figures.get(metric), ("--direction", direction), planned)
    return Sweep(
        directory,
        kind,
        str(plan.get("name") or directory.resolve().name),
        plan.get("command", ""),
        metric,
        maximize,
        tuple(sides),
        baseline_of(plan, sides, baseline),
        tuple(plan.get("also", ())),
        figures,
        design_of(plan),
        _tuned_by(plan),
    )


def design_of(plan: Mapping[str, Any]) -> Design:
    """How a plan was made to decide.

    Raises:
        ConfigError: one of its values is none that a plan can have
    """
    settings = {
        "see": _within(plan, "definition", "see"),
        "rate": _within(plan, "shape", "lr"),
        **{key: plan.get(key) for key in keys(Design) if key in plan},
    }
    return read_settings(Design, {key: value for key, value in settings.items() if value is not None}, PLAN)


WHERE = "Name the folder of a sweep or of `blockwright ablate`: logs/*/multiruns/… or logs/ablation/*/…"


def _check_folder(directory: Path) -> None:
    if not directory.is_dir():
        near = [p.name for p in directory.parent.iterdir() if p.is_dir()] if directory.parent.is_dir() else []
        hint = did_you_mean(directory.name, near) if near and len(near) <= 20 else ""
        hint = hint if hint.startswith("Did you mean") else ""
        raise ConfigError("DIR", str(directory), "is not a folder", f"{hint}. {WHERE}" if hint else WHERE)
    if (not (directory / PLAN).exists() and (directory / ".hydra").is_dir()) or (directory / RESULTS).exists():
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


def _tuned_by(plan: Mapping[str, Any]) -> Aim | None:
    """The figure that chose the tuned values, whichever is compared now; None where nothing was tuned."""
    if not plan.get("tune"):
        return None
    aim = plan.get("tuned_by") or {key: plan[key] for key in ("metric", "direction") if key in plan}
    return read_settings(Aim, aim, f"{PLAN}: tuned_by")


def _aim(directory: Path, plan: Mapping[str, Any]) -> tuple[str, tuple[str, str | None], str]:
    """The sweep's metric, where its direction is written with what is, and the kind of sweep."""
    if "metric" in plan:
        return plan["metric"], (f"direction of {directory / PLAN}", plan.get("direction")), plan.get("kind", GRID)
    try:
        written = read_yaml(directory, "multirun.yaml")
    except ConfigError:  # none, or an incomplete file
        written = None
    metric, sweeper = _within(written, "optimized_metric"), _within(written, "hydra", "sweeper")
    kind, way = "search" if "optuna" in str(_within(sweeper, "_target_")) else GRID, _within(sweeper, "direction")
    said = f"direction of {directory / 'multirun.yaml'}", None if way is None else str(way)
    return str(metric or "val/loss"), said, plan.get("kind", kind)


def _within(value: Any, *keys: str) -> Any:
    """A value in nested mappings; None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _check_any_figure(directory: Path, runs: Sequence[Run], metric: str) -> None:
    if any(run.result.value(metric) is not None for run in runs):
        return
    plans.refuse_record(directory)
    results = [run.result for run in runs]
    logged = {name for result in results if result.status == "completed" for name in result.metrics}
    if logged and metric not in logged:
        raise ConfigError("--metric", metric, "no run of the sweep logged it", did_you_mean(metric, logged))
    states = Counter(f"without a finite {metric}" if r.status == "completed" else r.status for r in results)
    counted = ", ".join(f"{count} {status}" for status, count in states.items())
    reasons = Counter(r.reason.splitlines()[0][:200] for r in results if r.reason and r.status != UNFINISHED)
    why = f"; most often: {reasons.most_common(1)[0][0]}" if reasons else ""
    remedy = f"Resume it: blockwright sweep resume {directory}" if UNFINISHED in states else "Fix that, and retry"
    raise ConfigError("DIR", str(directory), f"none of its {len(runs)} jobs has a figure ({counted}{why})", remedy)


def _run(number: int, folder: Path | None, job: Mapping[str, Any]) -> Run:
    overrides = tuple(job.get("overrides") or (overrides_of(folder) if folder else ()))
    seed = _seed(overrides) if job.get("seed") is None else int(job["seed"])
    result = Result(UNFINISHED, reason="has not begun") if folder is None else Result.read(folder)
    curves = {} if folder is None else curves_of(folder)
    stage, tries = job.get("stage") or COMPARE, job.get("tries") or {}
    return Run(number, folder, overrides, seed, job.get("lr"), result, curves, stage, tries)


def _seed(overrides: Sequence[str]) -> int:
    written = [o.partition("=")[2] for o in overrides if o.lstrip("+").partition("=")[0] == "seed"]
    return int(written[-1]) if written and written[-1].lstrip("-").isdigit() else 0


def curves_of(folder: Path) -> dict[str, Any]:
    """Curves without unexpected contents, which must not make the report fail."""
    try:
        curves = read_json(folder, "curves.json")
    except ConfigError:
        return {}
    if not isinstance(curves, dict):
        return {}
    kept: dict[str, Any] = {k: v for k, v in curves.items() if isinstance(v, int | float | dict)}
    for name in ("train", "val"):
        points = curves.get(name)
        pairs = [p for p in points if isinstance(p, list) and len(p) == 2] if isinstance(points, list) else []
        kept[name] = [p for p in pairs if all(isinstance(n, int | float) for n in p)]
    return kept
