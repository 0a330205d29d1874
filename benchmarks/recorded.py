"""Sweeps and ladders under ``benchmarks/results``: what their reports are made of, without the folders of their jobs.

    python -m benchmarks.recorded FOLDER    # record one that has ended
    python -m benchmarks.recorded           # conclude again those of which the statistics of today say something else
    python -m benchmarks.recorded benchmarks/results/ablations/attention --into DIR    # the whole report of a record

A verdict means one thing, whenever its runs ended: a test holds the records to what the code says of them.
"""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS
from blockwright.lab.ablation import bank, ending
from blockwright.lab.ablation.bank import Entry
from blockwright.lab.ladder import findings as ladders
from blockwright.lab.ladder import verdict as of_ladder
from blockwright.lab.ladder.report import show
from blockwright.lab.report import build
from blockwright.lab.report import verdict as of_sweep
from blockwright.lab.report.build import VERDICT
from blockwright.lab.report.findings import Findings, find
from blockwright.lab.report.reading import read
from blockwright.lab.sweep import plan as plans
from blockwright.lab.sweep import table
from blockwright.lab.sweep.plan import PLAN
from blockwright.registry import ConfigError
from blockwright.registry.command import Parser, run_command, strict_json
from blockwright.training.result import Result

ROOT = RESULTS.parents[1]
FOLDERS = {"ablation": RESULTS / "ablations", "ladder": RESULTS / "ladders"}
OF_RUN = {"params": "parameters", "active_params": "active_parameters", "fit_seconds": "fit_seconds"}  # by column
SAID = ("kind", "difference", "interval", "p", "sees", "speed_up", "at_equal_flops")  # of a verdict
PAGE = "report.md"
UNKEPT = re.compile(r"\[([^\]]*)\]\(\.\./\d+/\)")  # a link to the folder of a job
SECTION = re.compile(r"^(?=## )", re.M)


def recorded() -> list[Path]:
    """The folders of all that are recorded."""
    return sorted(plan.parent for folder in FOLDERS.values() for plan in folder.glob(f"*/{PLAN}"))


def record(folder: Path) -> Path:
    """Write the report of a sweep that has ended, and keep it with the plan and the table.

    Args:
        folder: of the sweep

    Returns:
        the folder of the record

    Raises:
        ConfigError: neither an ablation nor a ladder
    """
    plan = plans.read(folder)
    if plan["kind"] not in FOLDERS:
        rule = f"is a {plan['kind']}, of which nothing is recorded"
        raise ConfigError("FOLDER", str(folder), rule, f"Name the folder of one of: {', '.join(FOLDERS)}")
    table.summarise(folder)
    report(folder)
    to = FOLDERS[plan["kind"]] / plan["name"]
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    shutil.copytree(folder / "report", to / "report", ignore=shutil.ignore_patterns("index.html"))
    shorten(to / "report")
    shutil.copy(folder / "summary.csv", to)
    (to / PLAN).write_text(json.dumps(plan))
    for file in filter(Path.is_file, to.rglob("*")):
        text = file.read_text()
        for place, name in ((f"{folder}/", ""), (str(folder), plan["name"]), (f"{plan['cwd']}/", "")):
            text = text.replace(place, name)
        file.write_text(UNKEPT.sub(r"\1", text.replace(f'"cwd": "{plan["cwd"]}"', '"cwd": "."')))
    ship(to, same_runs=False)
    return to


def ship(record: Path, same_runs: bool) -> None:
    """Put the noise of a recorded ablation into the bank that is shipped, in place of what was there of it.

    Args:
        record: its folder
        same_runs: whether its runs are those of before, so that their date and versions are
    """
    if (entry := noise_of(record)) is None:
        return
    file, source = bank.SHIPPED / bank.FILE, (entry.source, entry.tuned)
    old = {(each.source, each.tuned): each for each in bank.read(bank.SHIPPED)}
    if same_runs and source in old:
        entry = replace(entry, date=old[source].date, versions=old[source].versions)
    kept = [each for key, each in old.items() if key != source]
    file.write_text("".join(each.as_line() for each in [*kept, entry]))


def noise_of(record: Path) -> Entry | None:
    """What the bank keeps of a recorded ablation; None of a ladder, and of what shows no noise."""
    if _is_ladder(record):
        return None
    with tempfile.TemporaryDirectory() as into:
        entry = ending.entry_of(findings_of(restore(record, Path(into))), json.loads((record / PLAN).read_text()), {})
    source, versions = str(record.relative_to(ROOT)), {"torch": ".".join(version("torch").split(".")[:2])}
    return entry and replace(entry, sd=float(f"{entry.sd:.4g}"), source=source, versions=versions)


def report(folder: Path) -> None:
    """Write the report of a sweep or a ladder."""
    if _is_ladder(folder):
        show(folder)
    else:
        build.write(findings_of(folder))


def document(folder: Path) -> dict[str, Any]:
    """The verdicts of a sweep or a ladder."""
    return of_ladder.document(ladders.find(folder)) if _is_ladder(folder) else of_sweep.document(findings_of(folder))


def findings_of(folder: Path) -> Findings:
    """The findings of a sweep."""
    return find(read(folder, None, None, None))


def _is_ladder(folder: Path) -> bool:
    return bool(json.loads((folder / PLAN).read_text())["kind"] == "ladder")


def restore(record: Path, into: Path) -> Path:
    """A sweep with the figures of its jobs, from its record.

    Args:
        record: its folder
        into: a new folder

    Returns:
        the folder of the sweep
    """
    folder = into / record.name
    folder.mkdir()
    shutil.copy(record / PLAN, folder)
    said = json.loads((record / "report" / VERDICT).read_text()) if (record / "report" / VERDICT).exists() else {}
    metric = json.loads((record / PLAN).read_text())["metric"]
    figures = {"val/loss": {"unit": "nats per token", "better": "less"}}
    if said.get("unit"):
        figures[metric] = {name: said[name] for name in ("unit", "better")}
    rows = _rows(record / "report" / "runs.csv")
    for row in rows if "job" in rows[0] else _rows(record / "summary.csv"):  # a ladder's runs.csv is of its rungs
        known = {name: float(row[column]) for column, name in OF_RUN.items() if row.get(column)}
        metrics = {name: float(value) for name, value in row.items() if "/" in name and value}
        plain = {"status": row["status"], "reason": row["reason"], "metrics": metrics, "figures": figures, **known}
        Result.of(plain).write(folder / row["job"])
    return folder


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def is_stale(record: Path) -> bool:
    """Whether the code of today says something else of the figures that are recorded, or nothing is said of them."""
    if not (record / "report" / VERDICT).exists():
        return True
    with tempfile.TemporaryDirectory() as into:
        now = _figures(json.loads(strict_json(document(restore(record, Path(into))))))
    said = _figures(json.loads((record / "report" / VERDICT).read_text()))
    return len(said) != len(now) or not all(map(_alike, said, now))


def _figures(plain: Any) -> list[Any]:
    """Kinds and figures of a verdict.json, in order; sentences may be written otherwise."""
    verdicts = [{key: value for key, value in each.items() if key in SAID} for each in plain["verdicts"]]
    return _flat([verdicts, plain.get("law")])


def _flat(plain: Any) -> list[Any]:
    if isinstance(plain, dict):
        return [value for key in sorted(plain) for value in (key, *_flat(plain[key]))]
    return [value for each in plain for value in _flat(each)] if isinstance(plain, list) else [plain]


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-9)  # fits end where their machine ends them
    return bool(one == other)


def again(record: Path) -> None:
    """Conclude a record again. What is of more than the last figures, as tokens to a loss, stays as it is."""
    with tempfile.TemporaryDirectory() as into:
        folder = restore(record, Path(into))
        report(folder)
        new, old = folder / "report", record / "report"
        (_, arms, *_), (head, *sections) = (SECTION.split((each / PAGE).read_text()) for each in (old, new))
        text = "".join([head, _filled(sections[0], arms), *sections[1:]])
        (new / PAGE).write_text(UNKEPT.sub(r"\1", text.replace(f"{folder}/", "").replace(str(folder), record.name)))
        shorten(new)
        for file in (new / PAGE, new / VERDICT, *new.glob("*.svg")):
            shutil.copy(file, old)


def shorten(report: Path) -> None:
    """Keep of a report what its verdicts rest on: their arms and the charts of their differences, or of a law.

    The rest is in ``runs.csv``, of which ``--into`` writes it again, but for what is of more than the last figures.
    """
    head, arms, *sections = SECTION.split((report / PAGE).read_text())
    text = "".join([head, arms, *(section.partition("\n| ")[0].rstrip() + "\n" for section in sections[:1])])
    (report / PAGE).write_text(text)
    for chart in report.glob("*.svg"):
        if f"]({chart.name})" not in text:
            chart.unlink()


def _filled(new: str, old: str) -> str:
    """A section, with the cells of the old one's tables where it knows none: ``–``."""
    known = {(row[0], name): cell for _, names, row in _rows_of(old) for name, cell in zip(names, row, strict=False)}
    lines = new.split("\n")
    for number, names, row in _rows_of(new):
        cells = [known.get((row[0], n), c) if c == "–" else c for n, c in zip(names, row, strict=False)]
        lines[number] = f"| {' | '.join(cells)} |"
    return "\n".join(lines)


def _rows_of(section: str) -> Iterator[tuple[int, list[str], list[str]]]:
    """Line, names of the columns and cells of each row of the tables in a section."""
    names: list[str] = []
    for number, line in enumerate(section.split("\n")):
        cells = line[2:-2].split(" | ") if line.startswith("| ") else []
        if not cells or not names:
            names = [cell.strip(" ↓↑") for cell in cells]
        elif not set(line) <= set("|- "):  # the line below the names
            yield number, names, cells


def main(arguments: Sequence[str]) -> None:
    """Run the command."""
    parser = Parser(prog="python -m benchmarks.recorded", description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, help="a sweep or a ladder to record")
    parser.add_argument("--into", metavar="DIR", type=Path, help="write the whole report of the record FOLDER there")
    given = parser.parse_args(arguments)
    if given.folder is not None and given.into is not None:
        plans.read(given.folder)  # refuses what holds none
        if (to := given.into / given.folder.resolve().name).exists():
            raise ConfigError("--into", str(given.into), f"{to} is there already", "Name another folder")
        given.into.mkdir(parents=True, exist_ok=True)
        report(folder := restore(given.folder.resolve(), given.into))
        print(folder / "report")
        return
    if given.folder is not None:
        print(record(given.folder.resolve()))
        return
    for each in filter(is_stale, recorded()):
        again(each)
        ship(each, same_runs=True)
        print(each)


if __name__ == "__main__":
    sys.exit(run_command(main))
