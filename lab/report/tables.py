"""The tables of a report: cells are text, with links to the run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from blockwright.lab.report import words
from blockwright.lab.report.findings import Finding, Findings
from blockwright.lab.report.sweep import Run
from blockwright.lab.statistics import variance
from blockwright.lab.statistics.tuning import RATE, TUNE

BUDGETS = (("params", "parameters"), ("active_params", "active"), ("flops", "FLOPs"), ("cache_bytes", "cache bytes"))
MOST_RUNS = 8  # listed of an arm; more would push its figures out of sight


@dataclass(frozen=True)
class Part:
    """A text and its link, relative to the report's folder."""

    text: str
    href: str = ""


Cell = tuple[Part, ...]


@dataclass(frozen=True)
class Row:
    """Cells, and the CSS class of the row."""

    cells: tuple[Cell, ...]
    cls: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns; the first cell of a row is its name.

    Args:
        numeric, wide: columns whose cells are numbers, or sentences
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    numeric: frozenset[str] = field(default_factory=frozenset)
    wide: frozenset[str] = field(default_factory=frozenset)
    note: str = ""


def link(run: Run, text: str) -> Part:
    return Part(text, f"../{run.folder.name}/" if run.folder is not None else "")


def row(*cells: str | Part | Sequence[Part], cls: str = "") -> Row:
    """A row; each cell is a text, a part or several."""
    made = [(Part(c),) if isinstance(c, str) else (c,) if isinstance(c, Part) else tuple(c) for c in cells]
    return Row(tuple(made), cls)


def arms(findings: Findings) -> Table:
    """Every arm with its figures, lost ones included."""
    metric = findings.sweep.metric
    several = len({f.against for f in findings.others}) > 1
    also = findings.sweep.also
    sweep, shown = findings.sweep, [words.headed(name, findings.sweep) for name in (metric, *also)]
    columns = ("arm", "seeds: runs", shown[0], *(("against",) if several else ()), "difference", "p", *shown[1:])
    columns = (*columns, "tokens", *(label for _, label in BUDGETS))
    settings = list(dict.fromkeys(each.path for f in findings.arms for each in f.tuned))
    columns = ("arm", *(("rate" if path == RATE else path.rpartition("model.")[2]) for path in settings), *columns[1:])
    rows = []
    for f in findings.arms:
        cells: list[str | Sequence[Part]] = [
            _runs(f),
            words.around(f.interval),
            *(("–" if f.is_baseline else f.against,) if several else ()),
            words.around(f.comparison.difference, sign=True) if f.comparison else "–",
            words.bare(f.comparison.corrected) if f.comparison else "–",
            *(words.around(f.also.get(name)) for name in also),
            words.ratio(f.speed_up),
            *(words.short(f.figures.get(key)) for key, _ in BUDGETS),
        ]
        cells = [*(_used(f, path) for path in settings), *cells]
        rows.append(row(f.name, *cells, cls="lost" if f.interval is None else ""))
    other = "the arm under against" if several else findings.baseline.name
    level = ", at the level of the look" if sweep.design.looks else ""
    note = (
        f"± is the 95 % interval of the mean; difference: to {other}, over common seeds, with the noise of all arms "
        f"together{level}; p: after Holm's correction; tokens: how many times fewer tokens than {other} to the higher "
        "of the two last losses of validations in training (below 1×: more tokens; –: unknown); active: parameters "
        "that a token passes; FLOPs: of training, a token; cache bytes: a token, in fp32. "
        f"{words.legend((metric, *also), sweep)}"
    )
    if any(each.edge for f in findings.arms for each in f.tuned):
        note += " Edge: no value beyond it was tried, so a better one may be there."
    return Table("Arms", columns, tuple(rows), frozenset(columns[1:]), note=note)


def _runs(f: Finding) -> Sequence[Part]:
    """How many seeds an arm has, and its runs, of many the first and the last: another table leads to each."""
    found = [link(run, str(run.job)) for run in f.runs]
    if len(found) > MOST_RUNS:
        found = [found[0], Part("…"), found[-1]]
    return (Part(f"{len(f.values)} of {len(f.runs)}:"), *found)


def differences(findings: Findings) -> Table | None:
    """Seeds as columns, arms as rows: each value links to its run."""
    seeds = sorted({run.seed for f in findings.arms for run in f.runs})
    if not any(f.values for f in findings.arms):
        return None
    noise = variance.of_each_arm({f.name: f.values for f in findings.arms})
    columns = ("arm", *(f"seed {seed}" for seed in seeds), *(("noise",) if noise else ()))
    rows = []
    for f in findings.arms:
        last = (words.plain(noise.get(f.name), 4),) if noise else ()
        rows.append(row(f.name, *(_seed_cell(f, seed, findings) for seed in seeds), *last))
    others = " or ".join(dict.fromkeys(f.against for f in findings.others)) or findings.baseline.name
    of = f" {words.in_unit(findings.sweep.unit)}" if findings.sweep.unit else ""
    note = f"{findings.sweep.metric}{of}, in brackets its difference to that seed of {others}. Each leads to its run."
    if noise:
        note += (
            " Noise: standard deviation of the arm over seeds, without what a seed does to all arms alike. Averaged "
            "weights or a decay to zero lower it; with few seeds it is uncertain itself."
        )
    return Table("Values by seed", columns, tuple(rows), frozenset(columns[1:]), note=note)


def _seed_cell(finding: Finding, seed: int, findings: Findings) -> str | Sequence[Part]:
    found = [run for run in finding.runs if run.seed == seed]
    if not found:
        return "–"
    if seed not in finding.values:
        run = found[-1]
        return (link(run, "diverged" if run.result.status == "completed" else run.result.status),)
    run = [r for r in found if r.result.value(findings.sweep.metric) is not None][-1]
    value = link(run, words.plain(finding.values[seed]))
    by_seed = finding.comparison.by_seed if finding.comparison else {}
    return (value, Part(f"({words.signed(by_seed[seed], 4)})")) if seed in by_seed else (value,)


def matches(findings: Findings) -> Table | None:
    """How each arm was matched, and its difference in every budget."""
    if not any(f.arm.match for f in findings.arms):
        return None
    columns = ("arm", "matched in", "by", "changed", *(label for _, label in BUDGETS))
    rows = []
    for f in findings.arms:
        match = f.arm.match or {}
        residual = match.get("residual") or {}
        changed = "; ".join(f"{k} {_change(v)}" for k, v in (match.get("changed") or {}).items())
        differences = [words.percent(residual.get(key)) if match else "–" for key, _ in BUDGETS]
        within = f"{match['budget']} within {100 * match['tol']:g} %" if {"budget", "tol"} <= match.keys() else ""
        within += f" of {words.short(match['target'])}" if within and match.get("target") else ""
        rows.append(
            row(
                f.name, within or str(match.get("budget", "–")), str(match.get("by", "–")), changed or "–", *differences
            )
        )
    other = findings.baseline.name
    note = f"What is left against {other} in each budget: a gain in one that was not matched has its price."
    return Table("Matching", columns, tuple(rows), frozenset(label for _, label in BUDGETS), note=note)


def _used(finding: Finding, path: str) -> str:
    """The value of a tuned setting at which an arm is compared."""
    for each in finding.tuned:
        if each.path == path and each.used is not None:
            return f"{each.used:.3g}{' (edge)' if each.edge else ''}"
    return "–"


def tuning(findings: Findings) -> Table | None:
    """How each setting of each arm was tuned."""
    every = [(f, each) for f in findings.arms for each in f.tuned]
    if not every:
        return None
    columns = ("arm", "setting", "tries", "from", "to", "best", "compared at", "tuned to within")
    rows = []
    for f, each in every:
        values = [one.value for one in each.tries]
        ends = [f"{end:.3g}" for end in (min(values), max(values))] if values else ["–", "–"]
        fit, excess = each.fit, each.excess
        best = f"{each.edge} tried" if each.edge else f"{fit.vertex:.3g}" if fit else "–"
        used = "–" if each.used is None else f"{each.used:.3g}"
        within = "–" if excess is None else words.plain(excess, words.decimals(excess))
        rows.append(row(f.name, each.name, str(len(each.tries)), *ends, best, used, within))
    aim = findings.sweep.aim.metric
    unit = findings.sweep.unit_of(aim)
    of = f", {words.in_unit(unit)}" if unit else ""
    by = f"Tuned by {aim}. " if aim != findings.sweep.metric else ""
    note = (
        f"{by}Best: the vertex of the curve through the tries around the best one, over octaves. Tuned to within: the "
        f"expected excess over the best value, or shortfall{of}, from the noise of the tries."
    )
    return Table("Tuning", columns, tuple(rows), frozenset(columns[2:]), note=note)


def _change(value: object) -> str:
    return f"{value[0]} → {value[1]}" if isinstance(value, list) and len(value) == 2 else str(value)


def runs(findings: Findings) -> Table:
    """All runs with their folders."""
    metric = findings.sweep.metric
    tuned = any(_rate_of(run) is not None for run in findings.sweep.runs)
    staged = any(run.stage == TUNE for run in findings.sweep.runs)
    named = words.headed(metric, findings.sweep)
    more = (*(("stage",) if staged else ()), "seed", *(("learning rate",) if tuned else ()))
    columns = ("run", "arm", *more, "status", named, "seconds", "overrides")
    given = [set(run.overrides) for run in findings.sweep.runs]
    shared = set.intersection(*given) if len(given) > 1 else set()
    rows = []
    for run in findings.sweep.runs:
        result, value = run.result, run.result.value(metric)
        diverged = result.status == "completed" and value is None and metric in result.metrics
        state = "diverged" if diverged else result.status
        seconds = "–" if result.fit_seconds is None else f"{result.fit_seconds:,.0f}"
        lr = _rate_of(run)
        rate = ("–" if lr is None else f"{lr:.3g}",) if tuned else ()
        stage = (run.stage,) if staged else ()
        own = " ".join(o for o in run.overrides if o not in shared)
        cells = (findings.arm_of(run), *stage, str(run.seed), *rate, state, words.plain(value), seconds, own)
        rows.append(row(link(run, str(run.job)), *cells, cls="lost" if value is None else ""))
    numeric = frozenset(("seed", "learning rate", named, "seconds"))
    alike = [o for o in findings.sweep.runs[0].overrides if o in shared]
    note = f"And all of them: {' '.join(alike)}" if alike else ""
    return Table("All runs", columns, tuple(rows), numeric, note=note)


def _rate_of(run: Run) -> float | None:
    return run.tries.get(RATE, run.lr)


def lost(findings: Findings) -> Table | None:
    """Runs without a figure, and why."""
    if not findings.lost:
        return None
    rows = [
        row(link(run, str(run.job)), findings.arm_of(run), str(run.seed), findings.why_lost(run))
        for run in findings.lost
    ]
    return Table("Lost", ("run", "arm", "seed", "reason"), tuple(rows), frozenset(("seed",)), frozenset(("reason",)))


def trials(findings: Findings) -> Table:
    """The trials of a search, best first."""
    metric, sign = findings.sweep.metric, -1 if findings.sweep.maximize else 1
    done = [(v, run) for run in findings.sweep.runs if (v := run.result.value(metric)) is not None]
    done.sort(key=lambda pair: (sign * pair[0], pair[1].job))
    rows = [row(link(run, str(run.job)), words.plain(v), findings.arm_of(run)) for v, run in done[:20]]
    title, named = "Best trials" if len(done) > 20 else "Trials, best first", words.headed(metric, findings.sweep)
    return Table(
        title, ("trial", named, "what differs"), tuple(rows), frozenset((named,)), frozenset(("what differs",))
    )
