"""What a sweep has to show: one table of all jobs, their overrides and final figures, failures included."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

FIGURES = ("val/loss", "val/bits_per_byte", "test/loss", "speed/tokens_per_second")


class SweepTable(Callback):
    """Hydra callback: when a multirun ends, shows its jobs and writes summary.csv beside them."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        summarise(Path(config.hydra.sweep.dir))


def record_failure(directory: Path, reason: str) -> None:
    """Leave a failed job's row where ``summarise`` finds it, with the figures it had when it failed."""
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "results.json"
    figures = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**figures, "status": "failed", "reason": reason}, indent=1))


def summarise(sweep: Path) -> list[dict[str, Any]]:
    """Read the jobs of a sweep, print them as a table, and write ``summary.csv``.

    Returns:
        a row for each job: number, status, what distinguishes its overrides, figures, reason of a failure
    """
    jobs = sorted((p for p in sweep.iterdir() if p.name.isdigit()), key=lambda p: int(p.name)) if sweep.is_dir() else []
    given = {job: _overrides(job) for job in jobs}
    common = set.intersection(*(set(o) for o in given.values())) if len(jobs) > 1 else set()
    rows = []
    for job in jobs:
        results = _results(job)
        metrics = results.get("metrics", {})
        row: dict[str, Any] = {"job": int(job.name), "status": results["status"]}
        row["overrides"] = " ".join(o for o in given[job] if o not in common)
        row |= {"parameters": results.get("parameters"), "active_parameters": results.get("active_parameters")}
        row |= {name: metrics.get(name) for name in FIGURES}
        row["reason"] = results.get("reason", "")
        rows.append(row)
    if rows:
        with (sweep / "summary.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        Console().print(_table(rows, sweep))
    return rows


def _overrides(job: Path) -> list[str]:
    file = job / ".hydra" / "overrides.yaml"
    return [str(o) for o in OmegaConf.load(file)] if file.exists() else []


def _results(job: Path) -> dict[str, Any]:
    file = job / "results.json"
    return json.loads(file.read_text()) if file.exists() else {"status": "unfinished", "reason": "no results.json"}


def _table(rows: list[dict[str, Any]], sweep: Path) -> Table:
    """Fits 80 columns: what differs between jobs, and what came out; reasons of failures stand below."""
    table = Table(title=f"{len(rows)} jobs: {sweep}/summary.csv", title_justify="left")
    table.add_column("job", justify="right")
    table.add_column("overrides", overflow="fold")
    for name in ("val loss", "bits/byte", "active", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    done = [row["val/loss"] for row in rows if row["status"] == "completed" and row["val/loss"] is not None]
    losses = [loss for loss in done if math.isfinite(loss)]  # no comparison holds for a NaN
    for row in rows:
        overrides = row["overrides"].replace(" ", "\n")
        if row["status"] != "completed":
            table.add_row(str(row["job"]), overrides, "failed", style="red")
            continue
        figures = ("val/loss", "val/bits_per_byte", "active_parameters", "speed/tokens_per_second")
        formats = (".4f", ".4f", "short", ",.0f")
        cells = [_cell(row[name], how) for name, how in zip(figures, formats, strict=True)]
        best = bool(losses) and row["val/loss"] == min(losses)
        table.add_row(str(row["job"]), overrides, *cells, style="bold green" if best else "")
    failed = [f"job {row['job']}: {row['reason']}" for row in rows if row["status"] != "completed"]
    table.caption = "\n".join(failed) or None
    table.caption_justify = "left"
    return table


def _cell(value: float | int | None, how: str) -> str:
    if value is None:
        return ""
    if how != "short":
        return format(value, how)
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.2f}{suffix}"
    return str(value)
