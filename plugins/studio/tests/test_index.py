"""The index of a log folder: what it has, links that lead out, and many runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from blockwright.plugins.studio.index import FRESH, Index


def make(folder: Path, file: str = "results.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("{}")
    return folder


def renewed(index: Index) -> Index:
    """The same index, as it is a second later."""
    index._looked -= FRESH
    return index


def test_runs_and_sweeps_are_found_wherever_they_are_and_the_newest_is_first(tmp_path: Path) -> None:
    for number, name in enumerate(("train/runs/a", "ablation/x/b", "train/cli/c")):
        os.utime(make(tmp_path / name), (number, number))
    os.utime(make(tmp_path / "train/multiruns/d", "plan.json"), (9, 9))
    make(tmp_path / "train/multiruns/d/0")
    found = Index(tmp_path).newest()
    assert [place.name for place in found] == ["train/multiruns/d", "train/cli/c", "ablation/x/b", "train/runs/a"]
    assert [place.kind for place in found] == ["sweep", "run", "run", "run"]
    assert [place.name for place in Index(tmp_path).newest("CLI")] == ["train/cli/c"]


def test_a_new_run_and_one_that_is_gone_are_noticed(tmp_path: Path) -> None:
    index = Index(tmp_path / "logs")
    assert index.newest() == []
    first = make(tmp_path / "logs/train/runs/a")
    assert [place.name for place in renewed(index).newest()] == ["train/runs/a"]
    make(tmp_path / "logs/train/runs/b")
    (first / "results.json").unlink()
    first.rmdir()
    assert [place.name for place in renewed(index).newest()] == ["train/runs/b"]


def test_a_folder_is_read_once_and_again_where_it_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        make(tmp_path / "runs" / str(number))
    read: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(os, "scandir", lambda folder: [read.append(Path(folder).name), scan(folder)][1])
    index = Index(tmp_path)
    index.newest()
    assert len(read) == 22
    index.newest()
    renewed(index).newest()
    assert len(read) == 22
    (tmp_path / "runs" / "7" / "curves.json").write_text("{}")
    renewed(index).newest()
    assert read[22:] == ["7"]


def test_no_link_is_followed_and_no_other_path_is_a_name(tmp_path: Path) -> None:
    make(tmp_path / "outside/run")
    logs = tmp_path / "logs"
    sweep = make(logs / "sweep", "plan.json")
    make(sweep / "0")
    for place in (logs / "link", logs / "runs", sweep / "1"):
        place.symlink_to(tmp_path / "outside")
    (logs / "circle").symlink_to(logs)
    index = Index(logs)
    assert [place.name for place in index.newest()] == ["sweep"]
    assert index.find("sweep") and index.find("sweep/0")
    for name in ("", "/", "..", "../outside/run", "sweep/../../outside/run", "link/run", "sweep/1", "sweep/../sweep",
                 "sweep/9", "sweep/x", "sweep/0/", "/etc", "sweep/0/0", "sweep\0", "sweep/٣"):  # fmt: skip
        assert index.find(name) is None, name


def test_names_that_a_terminal_or_a_page_could_take_for_something_else_are_names(tmp_path: Path) -> None:
    names = ["<script>alert(1)<", "a b%2e%2e", "ü&?#"]
    for name in names:
        make(tmp_path / name)
    make(tmp_path / "line\nbreak")
    assert {place.name for place in Index(tmp_path).newest()} == set(names)


@pytest.mark.slow
def test_ten_thousand_runs_are_listed_in_a_second_and_then_at_once(tmp_path: Path) -> None:
    for number in range(10_000):
        make(tmp_path / "train" / "runs" / f"{number:05}")
    index = Index(tmp_path)

    def seconds() -> float:
        start = time.process_time()
        assert len(index.newest()) == 10_000
        return time.process_time() - start

    first = seconds()
    again = [(renewed(index), seconds())[1] for _ in range(5)]
    found = [seconds() for _ in range(5)]
    print(f"first {first:.3f} s, again {min(again):.3f} s, within a second {min(found):.4f} s")
    assert first < 2.0 and min(again) < 0.5 and min(found) < 0.05
