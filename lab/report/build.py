"""Write DIR/report/ of a sweep: index.html, which works offline, report.md, verdict.json, runs.csv, the charts."""

from __future__ import annotations

import csv
import datetime
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.report import charts, costs, tables, words
from blockwright.lab.report.document import written
from blockwright.lab.report.figure import Figure
from blockwright.lab.report.findings import Findings
from blockwright.lab.report.method import basis
from blockwright.lab.report.svg import CSS, standalone
from blockwright.lab.report.tables import Cell, Table
from blockwright.lab.report.tuned import RATE
from blockwright.lab.report.verdict import verdicts
from blockwright.registry import ConfigError
from blockwright.registry.extras import require
from blockwright.registry.folder import own_folder
from blockwright.training.writing import write_text

HERE = Path(__file__).parent
VERDICT = "verdict.json"
KINDS = {"ablation": "Ablation", "grid": "Sweep", "search": "Search"}
LABELS = {
    "better": "better",
    "worse": "worse",
    "same": "the same",
    "undecided": "undecided",
    "none": "no verdict",
    "baseline": "baseline",
}  # in the order of the headline


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    heading: str
    figures: list[Figure]
    tables: list[Table]
    lead: str = ""


@dataclass(frozen=True)
class Head:
    """The top of a report, and what its foot names.

    Args:
        title, kind, name: of what is reported
        metric: with its unit
        better: which way
        state: what is missing; else empty
        headline: verdicts: ``kind``, which is also their class, ``label`` and ``text``
        method: how they were reached
        command: that made it
        directory: where it is
        search: whether it is a search, which has no verdicts
    """

    title: str
    kind: str
    name: str
    metric: str
    better: str
    state: str
    headline: list[dict[str, str]]
    method: str
    command: str
    directory: str
    search: bool = False


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
        files[VERDICT] = f"{written(findings)}\n"
    return save(findings.sweep.directory, head, sections, files)


def save(directory: Path, head: Head, sections: list[Section], further: Mapping[str, str]) -> Path:
    """Write a report into a folder, replacing an older one.

    Args:
        directory: in which report/ is made
        head, sections: of its page
        further: name → text of its other files

    Raises:
        ConfigError: it cannot be written
    """
    folder = own_folder(directory, "report")
    files = {f.file: standalone(f.chart) for section in sections for f in section.figures}
    files |= {**further, "report.md": markdown(head, sections), "index.html": page(head, sections)}
    try:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.svg"):
            old.unlink()
        for name, text in files.items():
            write_text(folder / name, text)
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise ConfigError("DIR", str(folder), rule, "Make room, or copy the sweep's folder elsewhere") from None
    return folder / "index.html"


def arrange(findings: Findings) -> list[Section]:
    """The sections of the page, in order."""
    drawn = charts.draw(findings)
    if findings.sweep.kind == "search":
        parts = [Section("search", "The search", drawn["search"], [tables.trials(findings)])]
    else:
        parts = [
            Section("arms", "Arms", [], [tables.arms(findings)]),
            Section("seeds", "Seeds and paired differences", drawn["differences"], _some(tables.differences(findings))),
            Section("curves", "How the loss fell", drawn["curves"], []),
            Section("trade", "What it costs", drawn["trade"], [], same_costs(findings)),
            Section("tuning", "How the arms were tuned", drawn["tuning"], _some(tables.tuning(findings))),
            Section("match", "What was matched", [], _some(tables.matches(findings))),
            *(Section(name, each.title, each.of(findings), []) for name, each in charts.offered().items()),
            Section("experts", "Load of the experts", drawn["experts"], []),
        ]
    parts.append(Section("lost", "What was lost", [], _some(tables.lost(findings))))
    parts.append(Section("runs", "Runs", [], [tables.runs(findings)]))
    return [part for part in parts if part.figures or part.tables or part.lead]


def same_costs(findings: Findings) -> str:
    """A sentence on the costs in which the arms do not differ, which have no chart."""
    known = {k: [f.figures[k] for f in findings.arms if f.interval and k in f.figures] for k in costs.COSTS}
    same = [costs.COSTS[key][1] for key, found in known.items() if len(found) > 1 and costs.is_alike(found)]
    return f"All arms have the same {' and the same '.join(same)}, within 0.1 %." if same else ""


def _some(table: Table | None) -> list[Table]:
    return [] if table is None else [table]


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


# --- the three formats ------------------------------------------------------------------------------------------------


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
        search=sweep.kind == "search",
    )


def page(head: Head, sections: list[Section]) -> str:
    """The self-contained HTML page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [{**vars(s), "figures": [_figure(f, Markup(f.chart.inline())) for f in s.figures]} for s in sections]
    return environment.get_template("page.html.j2").render(
        **vars(head),
        sections=shown,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        css=Markup(CSS.read_text() + (HERE / "page.css").read_text()),
    )


def _figure(figure: Figure, svg: Any) -> dict[str, Any]:
    return {"heading": figure.heading, "caption": figure.caption, "file": figure.file, "svg": svg}


def markdown(head: Head, sections: list[Section]) -> str:
    """The report as Markdown, with the charts as files beside it."""
    parts = [f"# {_escaped(head.title)}"]
    parts += [f"> {_escaped(head.state)}"] if head.state else []
    parts.append("\n".join(f"* **{v['label']}**: {_escaped(v['text'])}" for v in head.headline))
    parts += [head.method] if head.method else []
    for section in sections:
        parts.append(f"## {section.heading}")
        parts += [f"![{_escaped(f.heading)}]({f.file})\n\n{_escaped(f.caption)}" for f in section.figures]
        parts += [section.lead] if section.lead else []
        for table in section.tables:
            lines = [[_escaped(c) for c in table.columns], ["---"] * len(table.columns)]
            lines += [[_markdown_cell(cell) for cell in row.cells] for row in table.rows]
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            parts += [_escaped(table.note)] if table.note else []
    return "\n\n".join(parts) + "\n"


def _markdown_cell(cell: Cell) -> str:
    return " ".join(f"[{_escaped(p.text)}]({p.href})" if p.href else _escaped(p.text) for p in cell)


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


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
