"""Results on disk, the check that holds them, and records: what they say is what the code says of their figures."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ladder_folder
import pytest

from benchmarks import check, recorded
from benchmarks.race import spread
from benchmarks.record import RESULTS, Ratio, Result, Table, number
from benchmarks.recorded import VERDICT, again, is_stale, main
from blockwright.lab.ablation import bank
from blockwright.lab.ladder.__main__ import main as ladder
from blockwright.lab.report.terminal import report_command as report
from blockwright.lab.statistics.tuning import Try, fit
from blockwright.lab.sweep import plan as plans
from blockwright.registry import ConfigError

ABOUT = {"device": "abacus", "threads": 2, "system": "Linux", "date": "2026-01-01", "commit": "abc", "load_before": 0.1}
ABOUT |= {"versions": {"torch": "2.0"}, "command": "python -m benchmarks.toy"}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Saves a result of some ratios, name → (value, better), in a folder of the test's."""

    def make(folder: str, device: str = "abacus", where: str = "table", **ratios: tuple[float, str]) -> Path:
        found = [Ratio(f"{where}: {name}", spread([v]), better) for name, (v, better) in ratios.items()]  # type: ignore[arg-type]
        rows = [["ours", "as it comes", 3.0, 2.5, 3.5], ["theirs", "as it comes", 1.0, 0.9, 1.2]]
        table = Table("Speed", ("who", "settings", "tokens/s", "q1", "q3"), rows, plotted="tokens/s", note="A note.")
        return Result("toy", {**ABOUT, "device": device}, [table], found).save(tmp_path / folder)

    return make


def verdict(new: Path, recorded: Path) -> int:
    return check.main([str(new), "--recorded", str(recorded.parent)])


def test_result_is_json_and_a_table_and_a_plot(save: Save) -> None:
    file = save("out", speed=(2.0, "more"))
    document = json.loads(file.read_text())
    assert document["about"]["device"] == "abacus"
    assert document["ratios"][0]["spread"] == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 1}
    text = file.with_suffix(".md").read_text()
    for words in ("| ours | as it comes | 3 | 2.5 | 3.5 |", "abacus; 2 threads", "torch 2.0", "A note.", "2026-01-01"):
        assert words in text
    assert "<svg" in file.with_suffix(".svg").read_text()


def test_promise_holds_or_does_not() -> None:
    assert Ratio("a", spread([1.3]), bound=1.25).holds
    assert Ratio("a", spread([1.2]), bound=1.25).holds is False
    assert Ratio("a", spread([1.2]), "less", bound=1.5).holds
    assert Ratio("a", spread([1.6]), "less", bound=1.5).holds is False
    assert Ratio("a", spread([1.6])).holds is None


def test_check_passes_what_is_as_good_or_nearly(save: Save) -> None:
    recorded = save("recorded", speed=(2.0, "more"), memory=(0.5, "less"), off=(0.0, "less"))
    assert verdict(save("new", speed=(1.85, "more"), memory=(0.54, "less"), off=(1e-7, "less")), recorded) == 0
    assert verdict(save("new", speed=(9.0, "more"), memory=(0.1, "less"), off=(0.0, "less")), recorded) == 0


@pytest.mark.parametrize(
    ("change", "name"),
    [({"speed": (1.7, "more")}, "speed"), ({"memory": (0.56, "less")}, "memory"), ({"off": (0.01, "less")}, "off")],
)
def test_check_fails_what_is_a_tenth_worse(
    save: Save, change: dict[str, tuple[float, str]], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"speed": (2.0, "more"), "memory": (0.5, "less"), "off": (0.0, "less")}
    assert verdict(save("new", **{**good, **change}), save("recorded", **good)) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "worse" in line]
    assert len(failed) == 1
    assert failed[0].endswith(f"table: {name}")


def test_check_fails_what_is_missing_from_a_table_that_was_run(save: Save) -> None:
    recorded = save("recorded", speed=(2.0, "more"), memory=(0.5, "less"))
    assert verdict(save("new", speed=(2.0, "more")), recorded) == 1


def test_check_refuses_another_machine_and_nothing_in_common(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = save("recorded", speed=(2.0, "more"))
    assert verdict(save("other", device="slide rule", speed=(2.0, "more")), recorded) == 2
    assert "no record of 'slide rule', but of 'abacus'" in capsys.readouterr().err
    assert verdict(save("new", where="another", speed=(2.0, "more")), recorded) == 2
    assert verdict(recorded.parent / "absent.json", recorded) == 2


def test_each_machine_has_a_record_and_is_compared_with_it(save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    first = save("recorded", speed=(2.0, "more"))
    before = first.read_bytes()
    other = save("recorded", device="slide rule, 2 hands", speed=(4.0, "more"))
    assert first.read_bytes() == before and other.parent.name == "slide_rule_2_hands"
    assert save("recorded", device="slide rule, 2 hands", speed=(4.0, "more")) == other  # again, in its place
    for device, speed, code in (("abacus", 2.0, 0), ("abacus", 1.5, 1), ("slide rule, 2 hands", 2.0, 1)):
        assert verdict(save(f"new {device}", device=device, speed=(speed, "more")), first) == code, (device, speed)
    capsys.readouterr()
    assert check.main(["--recorded", str(first.parent)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in listed[2:]] == ["abacus", "slide rule, 2 hands"]


def test_a_damaged_record_neither_hinders_a_new_one_nor_is_replaced(save: Save) -> None:
    first = save("recorded", speed=(4.0, "more"))
    for text in ("", "{", "[]", '{"about": 1}'):
        first.write_text(text)
        made = save("recorded", speed=(4.0, "more"))
        assert made != first and first.read_text() == text
        made.unlink()


def test_pages_name_every_machine_that_there_is_a_record_of() -> None:
    devices = {row.split(" | ")[1].partition(" (")[0] for row in check.machines(RESULTS)[2:]}
    pages = [(RESULTS.parents[1] / page).read_text() for page in ("README.md", "docs/how-to/benchmarks.md")]
    assert devices and all(device in page for device in devices for page in pages)


def test_numbers_are_written_for_people() -> None:
    written = [number(value) for value in (1234567.8, 0.123456, 12, 72033792, None, "word")]
    assert written == ["1,234,568", "0.1235", "12", "72,033,792", "", "word"]


RECORD = next(each for each in recorded.recorded() if each.name == "residuals")


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_records_say_what_the_statistics_of_today_say_and_their_noise_is_in_the_bank(every: int) -> None:
    """After a change of the statistics: ``python -m benchmarks.recorded``, and correct the texts that quote them."""
    shipped = {(each.source, each.tuned): each for each in bank.read(bank.SHIPPED)}
    folders = recorded.recorded()[::-every]  # a ladder is the last
    assert not [folder.name for folder in folders if is_stale(folder)]
    for entry in filter(None, map(recorded.noise_of, folders)):
        known = shipped[entry.source, entry.tuned]
        assert known == replace(entry, date=known.date, versions=known.versions)


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


def test_a_record_has_the_charts_that_its_page_shows_and_no_others() -> None:
    for folder in recorded.recorded():
        report = folder / "report"
        shown = set(re.findall(r"\]\(([^)]+\.svg)\)", (report / recorded.PAGE).read_text()))
        assert shown and shown == {chart.name for chart in report.glob("*.svg")}, folder


def test_the_whole_report_of_a_record_is_written_elsewhere(tmp_path: Path) -> None:
    main([str(RECORD), "--into", str(tmp_path / "new")])
    page = (tmp_path / "new" / RECORD.name / "report" / recorded.PAGE).read_text()
    assert "## Runs" in page and "## Runs" not in (RECORD / "report" / recorded.PAGE).read_text()
    for folder, path in ((tmp_path, "DIR"), (RECORD, "--into")):
        with pytest.raises(ConfigError) as caught:
            main([str(folder), "--into", str(tmp_path / "new")])
        assert caught.value.path == path


@pytest.mark.parametrize(("command", "kind"), [(report, "ablations/residuals"), (ladder, "ladders/attention")])
def test_the_report_of_a_record_is_read_and_not_written_again(
    command: Callable[[list[str]], object], kind: str, tmp_path: Path
) -> None:
    kept = shutil.copytree(recorded.RESULTS / kind, tmp_path / "kept")
    with pytest.raises(ConfigError) as caught:
        command([str(kept)])
    assert str(kept / "report" / "report.md") in caught.value.remedy


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


PAGE = (RESULTS / "widths.md").read_text()
MODELS = ("64", "256, rules", "256, standard")


def best(optimizer: str, model: str) -> float:
    """The vertex of the tries that the page lists."""
    (row,) = re.findall(rf"^\| {optimizer}, {model} \|(.*)\|$", PAGE, re.M)
    return fit([Try(*map(float, each.split(":"))) for each in row.split("|")]).vertex


@pytest.mark.parametrize("optimizer", ["Muon", "AdamW"])
def test_best_rates_are_those_of_the_tries(optimizer: str) -> None:
    (row,) = re.findall(rf"^\| {optimizer} \|(.*)\|$", PAGE, re.M)
    base, rules, moved, standard, moved_without = (
        float(cell.strip().strip("*").replace("−", "-")) for cell in row.split("|")
    )
    found = [best(optimizer, model) for model in MODELS]
    assert [base, rules, standard] == pytest.approx(found, rel=0.02)
    assert [moved, moved_without] == pytest.approx([math.log2(each / found[0]) for each in found[1:]], abs=0.015)
    assert abs(moved) < 0.5 < 1.5 < -moved_without
