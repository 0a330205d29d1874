"""Records of sweeps: what they say is what the code says of their figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ladder_folder
import pytest

from benchmarks import recorded
from benchmarks.recorded import VERDICT, again, is_stale, main
from blockwright.lab.ablation import bank
from blockwright.lab.ladder.__main__ import main as ladder
from blockwright.lab.report.__main__ import main as report
from blockwright.lab.sweep import plan as plans
from blockwright.registry import ConfigError

RECORD = next(each for each in recorded.recorded() if each.name == "residuals")


@pytest.mark.parametrize("folder", recorded.recorded(), ids=lambda folder: folder.name)
def test_verdicts_are_those_of_the_statistics_of_today(folder: Path) -> None:
    """After a change of the statistics: ``python -m benchmarks.recorded``, and correct the texts that quote them."""
    assert not is_stale(folder)


@pytest.mark.parametrize("folder", recorded.recorded(), ids=lambda folder: folder.name)
def test_noise_is_in_the_bank_that_is_shipped(folder: Path) -> None:
    if (entry := recorded.noise_of(folder)) is not None:
        shipped = {(each.source, each.tuned): each for each in bank.read(bank.SHIPPED)}[entry.source, entry.tuned]
        assert shipped == replace(entry, date=shipped.date, versions=shipped.versions)


def test_another_record_of_a_name_takes_its_place_in_the_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(bank.SHIPPED / bank.FILE, tmp_path)
    monkeypatch.setattr(bank, "SHIPPED", tmp_path)
    (now,) = (each for each in bank.read(tmp_path) if each.name == "residuals")
    others = [each for each in bank.read(tmp_path) if each != now]
    old = replace(now, params=1.0, tokens=1.0, sd=1.0, date="2020-01-01", versions={"torch": "1.0"})
    for same_runs in (True, False):
        (tmp_path / bank.FILE).write_text("".join(each.as_line() for each in [*others, old]))
        recorded.ship(RECORD, same_runs)
        *kept, new = bank.read(tmp_path)
        assert kept == others and new == replace(now, date=new.date, versions=new.versions)
        assert ((new.date, new.versions) == (old.date, old.versions)) == same_runs


@pytest.mark.slow
def test_another_verdict_is_seen_and_mended(tmp_path: Path) -> None:
    kept = shutil.copytree(RECORD, tmp_path / "residuals")
    file = kept / "report" / VERDICT
    said = json.loads(file.read_text())
    said["verdicts"][0]["p"] *= 1.01
    file.write_text(json.dumps(said))
    assert is_stale(kept)
    page, charts = (kept / "report" / "report.md").read_text(), len([*kept.rglob("*.svg")])
    again(kept)
    assert not is_stale(kept)
    assert (kept / "report" / "report.md").read_text() == page, "its charts and tables are there as before"
    assert len([*kept.rglob("*.svg")]) == charts


@pytest.mark.parametrize(("command", "kind"), [(report, "ablations/residuals"), (ladder, "ladders/attention")])
def test_the_report_of_a_record_is_read_and_not_written_again(
    command: Callable[[list[str]], object], kind: str, tmp_path: Path
) -> None:
    kept = shutil.copytree(recorded.RESULTS / kind, tmp_path / "kept")
    with pytest.raises(ConfigError, match="is a record") as caught:
        command([str(kept)])
    assert caught.value.remedy == f"Read {kept / 'report' / 'report.md'}"


def test_what_is_no_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no"):
        main([str(tmp_path)])
    plans.write(tmp_path, {"kind": "grid", "name": "mine", "metric": "val/loss", "direction": "minimize", "jobs": []})
    with pytest.raises(ConfigError, match="is a grid"):
        main([str(tmp_path)])


@pytest.mark.slow
def test_a_ladder_is_recorded_without_the_place_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "FOLDERS", {"ladder": tmp_path / "kept"})
    folder = ladder_folder.write(tmp_path / "run", {"a": (1, 1), "b": (1.2, 1)})
    main([str(folder)])
    (kept,) = recorded.recorded()
    assert kept.name == "mine" and not is_stale(kept)
    files = {file.name: file.read_text() for file in kept.rglob("*") if file.is_file()}
    assert {"plan.json", "summary.csv", "report.md", VERDICT} <= set(files)
    assert not [name for name, text in files.items() if str(tmp_path) in text]
