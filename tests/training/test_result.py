"""Files of a run are whole or as they were, and damaged or untrusted ones do no harm: results, metrics, locks."""

from __future__ import annotations

import csv
import fcntl
import json
import math
import os
import resource
from pathlib import Path
from typing import Any

import pytest

from blockwright.registry.folder import write_json, write_text
from blockwright.training import claims
from blockwright.training.csv_logger import CSVLogger
from blockwright.training.figure import Figure
from blockwright.training.result import RESULTS, Result, record_failure

LOSS = Figure("loss", "nats per token", "less", ("val",))


def test_result_comes_back_as_it_was_written(tmp_path: Path) -> None:
    result = Result("completed", 10, 8, 3, 0.5, 1.5, 2.5, {"val/loss": math.inf}, {"val/loss": LOSS})
    result.write(tmp_path / "run")
    assert Result.read(tmp_path / "run") == result


def test_file_holds_known_values_in_a_fixed_order(tmp_path: Path) -> None:
    Result("completed", parameters=10, steps=0, metrics={"val/loss": 1.0}, figures={"val/loss": LOSS}).write(tmp_path)
    plain = json.loads((tmp_path / RESULTS).read_text())
    figures = {"val/loss": {"unit": "nats per token", "better": "less"}}
    known = [("status", "completed"), ("parameters", 10), ("steps", 0), ("metrics", {"val/loss": 1.0})]
    assert list(plain.items()) == [*known, ("figures", figures)]


@pytest.mark.parametrize("text", ['{"status": "comp', "[1]", "{}", '{"status": 3}', "[" * 10_000, "\xff"])
def test_damaged_file_is_unreadable(tmp_path: Path, text: str) -> None:
    assert Result.read(tmp_path).status == "unfinished" and not Result.read(tmp_path).ended
    (tmp_path / RESULTS).write_text(text, encoding="latin-1")
    assert Result.read(tmp_path).status == "unreadable" and not Result.read(tmp_path).ended


@pytest.mark.parametrize(("value", "kept"), [(1e999, True), (3, True), (True, False), ("1", False), (10**400, False)])
def test_only_numbers_that_a_float_can_hold_are_figures(tmp_path: Path, value: Any, kept: bool) -> None:
    document = {"status": "completed", "steps": value, "metrics": {"val/loss": value, "val/nan": math.nan}, "reason": 3}
    (tmp_path / RESULTS).write_text(json.dumps(document))
    result = Result.read(tmp_path)
    assert ("val/loss" in result.metrics, result.steps is not None) == (kept, kept)
    assert math.isnan(result.metrics["val/nan"]) and result.reason == ""


def test_figures_that_are_not_described_so_are_left_out(tmp_path: Path) -> None:
    figures: Any = {"val/loss": {"unit": "nats", "better": "less"}, "val/b": 1}
    figures["val/a"] = {"unit": "\x1b[31m", "better": "less"}
    (tmp_path / RESULTS).write_text(json.dumps({"status": "completed", "figures": figures}))
    assert list(Result.read(tmp_path).figures) == ["val/loss"]


def test_value_is_finite_and_of_a_completed_run() -> None:
    metrics = {"val/loss": 1.0, "val/nan": math.nan}
    assert Result("completed", metrics=metrics).value("val/loss") == 1.0
    assert Result("completed", metrics=metrics).value("val/nan") is None
    assert Result("failed", metrics=metrics).value("val/loss") is None


def test_failure_keeps_the_figures_that_were_there(tmp_path: Path) -> None:
    Result("completed", 10, metrics={"val/loss": 1.0}).write(tmp_path)
    record_failure(tmp_path, "worse than others", "pruned", {"val/accuracy": 0.5})
    metrics = {"val/loss": 1.0, "val/accuracy": 0.5}
    assert Result.read(tmp_path) == Result("pruned", 10, metrics=metrics, reason="worse than others")


def test_text_is_what_was_written_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "1 ± 2\n")
    write_text(file, "3 ± 4\n")
    assert file.read_bytes().decode("utf-8") == "3 ± 4\n" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_writer_that_ends_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"a": 1}


def log(folder: Path, *rows: tuple[int, dict[str, float]]) -> None:
    logger = CSVLogger(folder, name="csv", version="")
    for step, figures in rows:
        logger.log_metrics(figures, step)
    logger.save()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "csv" / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


def test_rows_of_the_past_stay_and_those_logged_again_are_there_once(tmp_path: Path) -> None:
    log(
        tmp_path,
        (1, {"train/loss": 3.0}),
        (2, {"train/loss": 2.0}),
        (2, {"epoch": 0, "val/loss": 2.5}),
        (3, {"train/loss": 9.0}),
    )
    again = [
        (2, {"epoch": 0, "train/loss": 2.0}),
        (3, {"train/loss": 1.0}),
        (3, {"val/loss": 1.5, "val/perplexity": 4.0}),
    ]
    log(tmp_path, *again)
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


def test_one_process_of_a_machine_writes_a_folder(tmp_path: Path) -> None:
    with claims.only_writer(tmp_path) as first:
        with claims.only_writer(tmp_path) as second:
            assert first and not second
        with claims.only_writer(tmp_path) as third:  # the second has left the lock to the first
            assert not third
    assert not list(tmp_path.iterdir())
    with claims.only_writer(tmp_path) as alone:
        assert alone


def test_lock_that_another_machine_has_left_is_no_writer(tmp_path: Path) -> None:
    with claims.only_writer(tmp_path):
        (tmp_path / claims.LOCK).write_text("7 0badc0de")
        with claims.only_writer(tmp_path) as alone:
            assert alone
    with claims.only_writer(tmp_path / "missing") as alone:
        assert alone


def test_lock_file_that_its_writer_removes_meanwhile_is_no_lock(tmp_path: Path, monkeypatch: Any) -> None:
    """A writer ends between another's opening of the file and its lock: that lock would be of a file without a name,
    and a third writer would be alone too."""
    flock, first = fcntl.flock, claims.only_writer(tmp_path)
    first.__enter__()

    def ends_before(descriptor: int, operation: int) -> Any:
        monkeypatch.setattr(fcntl, "flock", flock)
        first.__exit__(None, None, None)
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", ends_before)
    with claims.only_writer(tmp_path) as second, claims.only_writer(tmp_path) as third:
        assert second and not third


@pytest.mark.parametrize("left", [None, ""])
def test_lock_that_is_just_taken_or_left_has_a_writer(left: str | None, tmp_path: Path) -> None:
    """Its file is not written yet, or has no name any more: no traceback, and not alone."""
    with claims.only_writer(tmp_path):
        take = claims.take

        def fails(folder: Path) -> None:
            assert take(folder) is None
            (folder / claims.LOCK).unlink() if left is None else (folder / claims.LOCK).write_text(left)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(claims, "take", fails)
            with claims.only_writer(tmp_path) as second:
                assert not second


def test_locks_of_the_killed_are_removed_and_those_of_the_living_and_of_other_machines_stay(tmp_path: Path) -> None:
    (killed := tmp_path / f".{claims.new_owner()}.lock").touch()
    (elsewhere := tmp_path / ".another-machine-01234567-0123456789ab.lock").touch()
    with claims.claimed(tmp_path, owner := claims.new_owner()):
        claims.remove_old_locks(tmp_path)
        assert set(tmp_path.iterdir()) == {elsewhere, tmp_path / f".{owner}.lock"} and not killed.exists()


def test_claim_whose_lock_is_removed_before_it_is_locked_is_made_again(tmp_path: Path, monkeypatch: Any) -> None:
    flock = fcntl.flock

    def removed_before(descriptor: int, operation: int) -> Any:
        monkeypatch.setattr(fcntl, "flock", flock)
        claims.remove_old_locks(tmp_path)
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with claims.claimed(tmp_path, owner := claims.new_owner()):
        claims.remove_old_locks(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [f".{owner}.lock"]
