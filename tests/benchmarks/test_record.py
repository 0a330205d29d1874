"""Results on disk, and the check that holds them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import check
from benchmarks.record import Ratio, Result, Table, number
from benchmarks.statistics import spread

ABOUT = {
    "device": "abacus",
    "threads": 2,
    "system": "Linux",
    "date": "2026-01-01",
    "commit": "abc",
    "load_before": 0.1,
    "versions": {"torch": "2.0"},
    "command": "python -m benchmarks.toy",
}
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


def test_check_refuses_another_machine_and_nothing_in_common(save: Save) -> None:
    recorded = save("recorded", speed=(2.0, "more"))
    assert verdict(save("new", device="slide rule", speed=(2.0, "more")), recorded) == 2
    assert verdict(save("new", where="another", speed=(2.0, "more")), recorded) == 2
    assert verdict(recorded.parent / "absent.json", recorded) == 2


def test_numbers_are_written_for_people() -> None:
    written = [number(value) for value in (1234567.8, 0.123456, 12, 72033792, None, "word")]
    assert written == ["1,234,568", "0.1235", "12", "72,033,792", "", "word"]
