"""Options of a benchmark, and its output: JSON, Markdown and a plot, under ``benchmarks/results/``.

There is a record for each machine. That of the first one that ran a benchmark is in the folder itself; that of another
is in ``machines/DEVICE/`` below it, so that no record of one machine replaces that of another.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from benchmarks import machine
from benchmarks.race import Spread
from blockwright.lab.report.svg import Chart, Scale, cut, standalone


def parser(name: str, description: str | None, *, rounds: int, minutes: float) -> argparse.ArgumentParser:
    """A parser with the common options.

    Args:
        name: of the benchmark, ``benchmarks.<name>``
        description: its module's docstring
        rounds: default maximum of rounds
        minutes: approximate default duration of the whole run
    """
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=(description or "").partition("\n")[0]
    )
    made.add_argument("--quick", action="store_true", help="the smallest shape, a round or two: whether it runs at all")
    made.add_argument("--rounds", type=positive, default=rounds, help="at most so many (default: %(default)s)")
    made.add_argument("--minutes", type=float, default=minutes, help="begin no round after (default: %(default)s)")
    made.add_argument("--only", metavar="TEXT", help="rows and tables whose name has this in it; several by comma")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--threads", type=positive, default=machine.cores(), help="of a CPU (default: all)")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the result (default: benchmarks/results)")
    return made


def add_names(made: argparse.ArgumentParser, option: str, default: str, known: Sequence[str]) -> None:
    """Add an option that takes some of the known names, separated by commas."""

    def read(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]!r} among {', '.join(known)}")
        return names

    words = f"of {', '.join(known)}; several by comma (default: {default})"
    made.add_argument(f"--{option}", type=read, default=default.split(","), metavar="NAMES", help=words)


def read(made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options; ``--quick`` is one round without a time limit."""
    given = made.parse_args(arguments)
    if given.quick:
        given.rounds, given.minutes = 1, 0.0
    return given


def wanted(name: str, only: str | None) -> bool:
    """Whether a name matches ``--only``."""
    return only is None or any(part.strip().lower() in name.lower() for part in only.split(","))


def positive(text: str) -> int:
    """The type of an option: a whole number, 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return value


BAR = 17  # pixels of a bar and its space
MACHINES = "machines"  # folder of those that were not the first
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True)
class Ratio:
    """A headline ratio, checked by ``benchmarks.check``.

    Args:
        name: numerator ÷ denominator; unique in the result
        spread: over the rounds
        better: whether more or less is better
        bound: the promised minimum (or maximum, if less is better); None for no promise
        checked: whether ``benchmarks.check`` checks it; not for seconds against a promise in seconds
    """

    name: str
    spread: Spread
    better: Literal["more", "less"] = "more"
    bound: float | None = None
    checked: bool = True

    @property
    def holds(self) -> bool | None:
        """Whether the median meets the bound."""
        if self.bound is None:
            return None
        return self.spread.median >= self.bound if self.better == "more" else self.spread.median <= self.bound


@dataclass
class Table:
    """Rows of plain values under named columns.

    Args:
        title: of the table
        columns: their names; the first is the row's own
        rows: one value per column
        plotted: column of the plot, with its quartiles in the next two columns; None for no plot
        note: a sentence below the table
    """

    title: str
    columns: Sequence[str]
    rows: list[list[Any]] = field(default_factory=list)
    plotted: str | None = None
    note: str = ""


@dataclass
class Result:
    """The complete result of one run.

    Args:
        benchmark: its name
        about: see benchmarks/machine.py
        tables, ratios: the findings
        raw: every single measurement
    """

    benchmark: str
    about: Mapping[str, Any]
    tables: list[Table] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path = RESULTS) -> Path:
        """Write ``<benchmark>.json``, ``.md`` and ``.svg`` of this machine; returns the path of the first."""
        stem = place(folder, self.benchmark, self.about["device"]).with_suffix("")
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps(self.plain(), indent=1, ensure_ascii=False) + "\n")
        stem.with_suffix(".md").write_text(self.markdown())
        if any(table.plotted for table in self.tables):
            plot(self, stem.with_suffix(".svg"))
        return stem.with_suffix(".json")

    def plain(self) -> dict[str, Any]:
        """The JSON document."""
        return {
            "benchmark": self.benchmark,
            "about": dict(self.about),
            "ratios": [{**asdict(ratio), "holds": ratio.holds} for ratio in self.ratios],
            "tables": [asdict(table) for table in self.tables],
            "raw": self.raw,
        }

    def markdown(self) -> str:
        """The tables and the promised ratios, or all where nothing is promised, with the machine's description."""
        about = self.about
        versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        head = [
            f"# {self.benchmark}",
            f"{about['device']}; {about['threads']} threads; {about['system']}; {about['date']}; "
            f"commit {about['commit']}; load before {about['load_before']}.",
            f"{versions}.",
            f"`{about['command']}`",
        ]
        parts = ["\n\n".join(head)]
        for table in self.tables:
            lines = [f"## {table.title}", "", *_rows(table.columns, table.rows)]
            parts.append("\n".join(lines + (["", table.note] if table.note else [])))
        if shown := [ratio for ratio in self.ratios if ratio.bound is not None] or self.ratios:
            parts.append("\n".join(["## Ratios", "", *_rows(*_ratio_rows(shown))]))
        if others := len(self.ratios) - len(shown):
            parts.append(f"{others} others, of which nothing is promised, are in the JSON beside this page.")
        return "\n\n".join(parts) + "\n"


def records(folder: Path, benchmark: str) -> dict[Path, dict[str, Any]]:
    """The documents of a benchmark, of every machine, by their files.

    Raises:
        OSError, ValueError: one cannot be read
    """
    return {file: json.loads(file.read_text()) for file in _files(folder, benchmark)}


def place(folder: Path, benchmark: str, device: str) -> Path:
    """The file of the record of one machine: where it is, or where a new one belongs."""
    known = _files(folder, benchmark)
    found = next((file for file in known if _device(file) == device), None)
    own = re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    return found or (folder / MACHINES / own if known else folder) / f"{benchmark}.json"


def _files(folder: Path, benchmark: str) -> list[Path]:
    files = [folder / f"{benchmark}.json", *sorted(folder.glob(f"{MACHINES}/*/{benchmark}.json"))]
    return [file for file in files if file.exists()]


def _device(file: Path) -> Any:
    """The machine of a record; None of a damaged one, which must not hinder a new one, nor is it replaced."""
    try:
        return json.loads(file.read_text())["about"]["device"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ratio_rows(ratios: Sequence[Ratio]) -> tuple[list[str], list[list[Any]]]:
    """Rows of ratios, those with a promise first."""
    words = {True: "holds", False: "**does not hold**", None: ""}
    signs = {"more": "≥", "less": "≤"}
    ordered = sorted(ratios, key=lambda ratio: ratio.bound is None)
    rows = [
        [
            *(r.name, r.spread.median, f"{number(r.spread.q1)} to {number(r.spread.q3)}", r.spread.n),
            *("" if r.bound is None else f"{signs[r.better]} {number(r.bound)}", words[r.holds]),
        ]
        for r in ordered
    ]
    return ["ratio", "median", "quartiles", "rounds", "promised", ""], rows


def _rows(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [[number(value) for value in row] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (list(columns), ["---"] * len(columns), *lines)]


def number(value: Any) -> str:
    """A formatted value: four digits of a float, thousands separated."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def plot(result: Result, file: Path) -> None:
    """Bars of the plotted columns, one chart per table, with quartiles as whiskers."""
    shown = [table for table in result.tables if table.plotted and table.rows]
    file.write_text(standalone(*(_bars(table) for table in shown)))


def _bars(table: Table) -> Chart:
    assert table.plotted is not None
    at = list(table.columns).index(table.plotted)
    rows = [row for row in table.rows if isinstance(row[at], float | int)]
    chart = Chart("bars", f"{table.title}: {table.plotted}", BAR * len(rows) + 80, left=230, top=34)
    x = Scale(0, 1.02 * max(float(cell) for row in rows for cell in row[at : at + 3]), chart.x0, chart.x1)
    chart.axes(x, None, table.plotted)
    chart.add("text", "strong", cut(table.title, 60), x=4.0, y=14, tip=table.title)
    for i, row in enumerate(rows):
        y, (middle, low, high) = chart.y1 + BAR * i, (float(cell) for cell in row[at : at + 3])
        name = " · ".join(str(part) for part in row[:at])
        ours = "s1" if str(row[0]).startswith("ours") else "s8"
        chart.add("text", "tick end", cut(name, 33), tip=name, x=chart.x0 - 6, y=y + 12)
        chart.add(
            "rect", f"block {ours}", tip=f"{name}: {middle:g}", x=chart.x0, y=y, width=x(middle) - x(0), height=BAR - 3
        )
        chart.add("line", "axis", x1=x(low), x2=x(high), y1=y + 7, y2=y + 7)
    return chart
