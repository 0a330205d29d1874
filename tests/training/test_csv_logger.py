"""A run that resumes in its own folder continues its metrics.csv."""

from __future__ import annotations

import csv
import resource
from pathlib import Path

import pytest

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


HEAD, ROWS = "epoch,step,train/loss\n", "0,1,3.0\n0,2,2.5\n"
DAMAGED = {
    "cut": HEAD + ROWS + "0,3",
    "cut within its step": HEAD + ROWS + "0,1",
    "cut within its value": HEAD + ROWS + "0,3,2",
    "cut, then appended to": HEAD + ROWS + "0,30,4,2.4\n" + "0\n",
    "CRLF": (HEAD + ROWS).replace("\n", "\r\n") + "0,3,2.4\r",
    "zeros of a power failure": HEAD + ROWS + "0,3" + "\0" * 4096,
    "no step": HEAD + ROWS + "0,,2.4\n0,2.5,2.4\n\n",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_run_resumes_after_rows_that_were_not_written_as_a_whole(name: str, tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(DAMAGED[name], newline="")
    log(tmp_path, (3, {"train/loss": 2.0}))
    losses = [(row["step"], row["train/loss"]) for row in rows(tmp_path)]
    assert losses == [("1", "3.0"), ("2", "2.5"), ("3", "2.0")]


@pytest.mark.parametrize("text", ["", "epoch,st", "\0" * 99])
def test_a_file_without_a_whole_head_is_begun_again(text: str, tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(text)
    log(tmp_path, (3, {"train/loss": 2.0}))
    assert rows(tmp_path) == [{"step": "3", "train/loss": "2.0"}]


@pytest.mark.parametrize("text", ["a,b\n1,2\n", HEAD + "x" * 200_000 + ",2,3\n"])
def test_a_table_of_something_else_is_kept_beside(text: str, tmp_path: Path) -> None:
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "metrics.csv").write_text(text)
    log(tmp_path, (3, {"train/loss": 2.0}))
    assert (tmp_path / "csv" / "metrics.other.csv").read_text() == text and len(rows(tmp_path)) == 1


@pytest.mark.parametrize("figure", ["train/loss", "val/loss"])
def test_a_full_disk_takes_no_row(figure: str, tmp_path: Path) -> None:
    """Neither where rows are appended nor where a new figure needs another head; with room again, nothing is lost."""
    logger = CSVLogger(tmp_path, name="csv", version="")
    logger.log_metrics({"train/loss": 3.0}, 1)
    logger.save()
    file = tmp_path / "csv" / "metrics.csv"
    before, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    logger.log_metrics({figure: 2.0}, 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 2, hard))
    try:
        with pytest.raises(OSError, match=r"metrics\.csv"):
            logger.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_bytes() == before
    logger.save()
    assert rows(tmp_path)[1] == {"step": "2", figure: "2.0"}
