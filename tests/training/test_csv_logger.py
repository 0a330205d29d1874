"""A run that resumes in its own folder continues its metrics.csv."""

from __future__ import annotations

import csv
from pathlib import Path

from blockwright.training.csv_logger import CSVLogger


def log(folder: Path, *rows: tuple[int, dict[str, float]]) -> None:
    logger = CSVLogger(folder, name="csv", version="")
    for step, figures in rows:
        logger.log_metrics(figures, step)
    logger.save()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_rows_of_the_past_stay_and_those_logged_again_are_there_once(tmp_path: Path) -> None:
    first = [
        (1, {"train/loss": 3.0}),
        (2, {"train/loss": 2.0}),
        (2, {"epoch": 0, "val/loss": 2.5}),
        (3, {"train/loss": 9.0}),
    ]
    log(tmp_path, *first)
    log(
        tmp_path,
        (2, {"epoch": 0, "train/loss": 2.0}),
        (3, {"train/loss": 1.0}),
        (3, {"val/loss": 1.5, "val/perplexity": 4.0}),
    )
    assert rows(tmp_path) == [
        {"step": "1", "train/loss": "3.0"},
        {"epoch": "0", "step": "2", "val/loss": "2.5"},
        {"epoch": "0", "step": "2", "train/loss": "2.0"},
        {"step": "3", "train/loss": "1.0"},
        {"step": "3", "val/loss": "1.5", "val/perplexity": "4.0"},
    ]


def test_new_run_begins_a_file(tmp_path: Path) -> None:
    log(tmp_path, (0, {"train/loss": 3.0}))
    log(tmp_path, (0, {"train/loss": 2.0}))
    assert rows(tmp_path) == [{"step": "0", "train/loss": "2.0"}]
