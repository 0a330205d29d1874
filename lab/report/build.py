"""Write DIR/report/ of a sweep: index.html, which works offline, report.md, verdict.json, runs.csv, the charts."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from blockwright.lab.report import charts, tables, words
from blockwright.lab.report.charts import COSTS, is_alike
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.models import models
from blockwright.lab.report.page import LABELS, Head, Section, save, some
from blockwright.lab.report.sentences import basis
from blockwright.lab.report.verdict import document, verdicts
from blockwright.lab.statistics.tuning import RATE
from blockwright.registry.command import strict_json
from blockwright.registry.errors import require

VERDICT = "verdict.json"
KINDS = {"ablation": "Ablation", "grid": "Sweep", "search": "Search"}


def need_packages() -> None:
    """Refuse a command whose report could not be written.

    Raises:
        ConfigError: a package of the extra ``lab`` is missing
    """
    require("lab", "jinja2", "scipy", path="blockwright.lab.report")


def write(findings: Findings) -> Path:
    """Write the report, replacing an older one."""
    head, sections = head_of(findings), arrange(findings)
    files = {"runs.csv": rows(findings)}
    if findings.sweep.kind != "search":
        files[VERDICT] = f"{strict_json(document(findings))}\n"
    return save(findings.sweep.directory, head, sections, files)


def arrange(findings: Findings) -> list[Section]:
    """The sections of the page, in order."""
    drawn = charts.draw(findings)
    if findings.sweep.kind == "search":
        parts = [Section("search", "The search", drawn["search"], [tables.trials(findings)])]
    else:
        parts = [
            Section("arms", "Arms", [], [tables.arms(findings)]),
            Section("seeds", "Seeds and paired differences", drawn["differences"], some(tables.differences(findings))),
            Section("curves", "How the loss fell", drawn["curves"], []),
            Section("trade", "What it costs", drawn["trade"], [], same_costs(findings)),
            Section("tuning", "How the arms were tuned", drawn["tuning"], some(tables.tuning(findings))),
            Section("match", "What was matched", [], some(tables.matches(findings))),
            Section("models", "The models", [], [], folded=models(findings)),
            *(_offered(name, each, findings) for name, each in charts.offered().items()),
            Section("experts", "Load of the experts", drawn["experts"], []),
        ]
    parts.append(Section("lost", "What was lost", [], some(tables.lost(findings))))
    parts.append(Section("runs", "Runs", [], [tables.runs(findings)]))
    return [part for part in parts if part.figures or part.tables or part.lead or part.folded]


def _offered(name: str, drawing: charts.Drawing, findings: Findings) -> Section:
    """The section of a package."""
    return Section(name, drawing.title, drawing.draw(findings), drawing.tabulate(findings))


def same_costs(findings: Findings) -> str:
    """A sentence on the costs in which the arms do not differ, which have no chart."""
    known = {k: [f.figures[k] for f in findings.arms if f.interval and k in f.figures] for k in COSTS}
    same = [COSTS[key][1] for key, found in known.items() if len(found) > 1 and is_alike(found)]
    return f"All arms have the same {' and the same '.join(same)}, within 0.1 %." if same else ""


def headline(findings: Findings) -> list[dict[str, str]]:
    """The verdicts, decided ones first, and the baseline; of a search, its best trial."""
    if findings.sweep.kind == "search":
        return [{"kind": "better", "label": "best", "text": best_trial(findings)}]
    sign, kinds = -1 if findings.sweep.maximize else 1, list(LABELS)
    decided = sorted(verdicts(findings), key=lambda v: (kinds.index(v.kind), sign * (v.difference or 0.0)))
    items = [(str(v.kind), _without_label(v.text)) for v in decided]
    items += [("baseline", words.measured(findings.baseline, findings))] if findings.baseline.values else []
    return [{"kind": kind, "label": LABELS[kind], "text": text} for kind, text in items]


def _without_label(text: str) -> str:
    """A sentence without the words that its label says already."""
    for label in ("No verdict: ", "Undecided: "):
        if text.startswith(label):
            return text[len(label) :]
    return text


def best_trial(findings: Findings) -> str:
    """The result of a search in one sentence."""
    metric, sign = findings.sweep.metric, -1 if findings.sweep.maximize else 1
    done = [(v, run) for run in findings.sweep.runs if (v := run.result.value(metric)) is not None]
    value, run = min(done, key=lambda pair: sign * pair[0])
    return (
        f"Trial {run.job} of {len(findings.sweep.runs)} is the best: {metric} {words.plain(value)} with "
        f"{findings.arm_of(run)}. The best of many trials looks better than it is: run it again with other seeds."
    )


def head_of(findings: Findings) -> Head:
    """The top of a sweep's report."""
    sweep = findings.sweep
    return Head(
        title=sweep.title,
        kind=KINDS.get(sweep.kind, sweep.kind),
        name=sweep.name,
        metric=f"{sweep.metric}, {sweep.unit}" if sweep.unit else sweep.metric,
        better="more is better" if sweep.maximize else "less is better",
        state=words.state(findings),
        headline=headline(findings),
        method=basis(findings),
        command=sweep.command,
        directory=str(sweep.directory),
        verdicts=sweep.kind != "search",
    )


def rows(findings: Findings) -> str:
    """All figures as CSV, a line per run."""
    names = sorted({name for run in findings.sweep.runs for name in run.result.metrics})
    head = ["job", "arm", "stage", "seed", "lr", "status", "reason", *(key for key, _ in tables.BUDGETS), "fit_seconds"]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*head, *names, "folder", "overrides"])
    for run in findings.sweep.runs:
        lost = run.result.value(findings.sweep.metric) is None
        reason = findings.why_lost(run) if lost else ""
        figures = [run.figures.get(key) for key, _ in tables.BUDGETS]
        known = [run.result.metrics.get(name) for name in names]
        place = "" if run.folder is None else f"../{run.folder.name}"
        items = [
            run.job,
            findings.arm_of(run),
            run.stage,
            run.seed,
            run.tries.get(RATE, run.lr),
            run.result.status,
            reason,
            *figures,
            run.result.fit_seconds,
        ]
        writer.writerow([*items, *known, place, " ".join(run.overrides)])
    return file.getvalue()
