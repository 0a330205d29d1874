"""A report as files: its page, which works offline, the same as Markdown, and its charts."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.lab.report import models
from blockwright.lab.report.models import Drawn
from blockwright.lab.report.svg import CSS, Figure, standalone
from blockwright.lab.report.tables import Cell, Table
from blockwright.registry import ConfigError
from blockwright.registry.folder import own_folder, write_text

HERE = Path(__file__).parent
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
    """A part of the page.

    Args:
        id, heading: of it
        figures, tables: shown below the lead
        lead: a sentence
        folded: pictures that a reader opens
    """

    id: str
    heading: str
    figures: list[Figure]
    tables: list[Table]
    lead: str = ""
    folded: Sequence[Drawn] = ()


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
        verdicts: whether it has verdicts, which verdict.json holds too
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
    verdicts: bool = True


def some(table: Table | None) -> list[Table]:
    """The tables of a section that has one or none."""
    return [] if table is None else [table]


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
    files |= {f.file: f.alone for section in sections for f in section.folded}
    files |= {**further, "report.md": markdown(head, sections), "index.html": html(head, sections)}
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            write_text(folder / name, text)
        for old in folder.glob("*.svg"):
            if old.name not in files:
                old.unlink()
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error})"
        raise ConfigError("DIR", str(folder), rule, "Make room, or copy the sweep's folder elsewhere") from None
    return folder / "index.html"


def html(head: Head, sections: list[Section]) -> str:
    """The self-contained HTML page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = [
        {
            **vars(s),
            "figures": [_figure(f, Markup(f.chart.inline())) for f in s.figures],
            "folded": [_figure(f, Markup(f.inline)) for f in s.folded],
        }
        for s in sections
    ]
    sheets = [CSS, HERE / "page.css", *(models.CSS if any(s.folded for s in sections) else ())]
    return environment.get_template("page.html.j2").render(
        **vars(head),
        sections=shown,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        css=Markup("".join(sheet.read_text() for sheet in sheets)),
    )


def _figure(figure: Figure | Drawn, svg: Any) -> dict[str, Any]:
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
        parts += [f"[{_escaped(f.heading)}]({f.file}): {_escaped(f.caption)}" for f in section.folded]
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
