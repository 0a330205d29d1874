"""Runs, sweeps, reports and their index; what a hostile folder holds is data."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_folder
from pairwise import pairs
from starlette.testclient import TestClient

from blockwright.plugins.studio import runs as reader
from blockwright.plugins.studio.runs import FRESH, Index
from blockwright.training.claims import take

Visit = Callable[..., TestClient]
SECRET = "canary-of-the-environment"


def run(logs: Path, name: str = "train/runs/a", loss: float = 1.5) -> Path:
    sweep, _, number = name.rpartition("/")
    falling = sweep_folder.falling(loss, random.Random(1))
    return sweep_folder.write_job(logs / sweep, number, ["seed=3"], sweep_folder.completed(loss), falling)  # type: ignore[arg-type]


def rows(client: TestClient, **options: Any) -> list[dict[str, Any]]:
    return client.get("/runs", params=options).json()["rows"]


def test_a_run_has_its_state_its_figures_and_its_curves(visit: Visit, logs: Path) -> None:
    run(logs)
    client = visit()
    (row,) = rows(client)
    assert (row["name"], row["kind"], row["state"]) == ("train/runs/a", "run", "completed")
    assert row["figures"] == {"val/loss": 1.5, "test/loss": 1.51}
    one = client.get("/run/train/runs/a").json()
    assert one["overrides"] == "seed=3" and one["chart"].startswith("<svg") and one["sweep"] is None
    assert {"name": "val/loss", "value": 1.5, "unit": "nats per token"} in one["results"]


def test_a_run_that_trains_is_running_and_its_curve_grows(visit: Visit, logs: Path) -> None:
    folder = sweep_folder.write_job(logs / "train" / "runs", 1, ["seed=1"])
    client = visit()
    assert client.get("/run/train/runs/1").json()["chart"] is None
    lock = take(folder)
    assert lock is not None
    assert rows(client)[0]["state"] == "running"
    (folder / "curves.json").write_text(json.dumps({"train": [[1, 5.0]], "val": [[1, 4.0], [2, 3.0]]}))
    chart = client.get("/run/train/runs/1").json()["chart"]
    (folder / "curves.json").write_text(json.dumps({"train": [[1, 5.0]], "val": [[1, 4.0], [2, 3.0], [3, 2.0]]}))
    assert client.get("/run/train/runs/1").json()["chart"] not in (chart, None)
    os.close(lock)
    assert rows(client)[0]["state"] == "unfinished"


def test_a_sweep_has_its_jobs_and_the_curves_of_the_best(visit: Visit, logs: Path) -> None:
    (logs / "ablation" / "x").mkdir(parents=True)
    sweep_folder.ablation(logs / "ablation" / "x")
    client = visit()
    (row,) = rows(client)
    assert (row["kind"], row["jobs"]) == ("sweep", 15)
    one = client.get("/run/ablation/x").json()
    assert len(one["rows"]) == 15 and one["chart"].startswith("<svg")
    assert one["rows"][5]["state"] == "diverged" and "model/attention=gqa" in one["rows"][5]["overrides"]
    assert client.get("/run/ablation/x/5").json()["sweep"] == "ablation/x"


def test_pages_have_fifty_runs(visit: Visit, logs: Path) -> None:
    for number in range(120):
        run(logs, f"train/runs/{number}")
    client = visit()
    pages = [rows(client, page=page) for page in range(4)]
    assert [len(page) for page in pages] == [50, 50, 20, 0]
    assert len({row["name"] for page in pages for row in page}) == 120
    assert client.get("/runs", params={"part": "runs/11"}).json()["total"] == 11
    for page in ("-1", "x", "9" * 9):
        assert client.get("/runs", params={"page": page}).status_code == 400


HOSTILE: dict[str, Any] = {
    "results.json": [
        "[" * 100_000, "\0", '{"status": 3}',
        '{"status": "completed", "metrics": {"val/loss": NaN, "x": 1e999, "y": "z"}}',
        json.dumps({"status": "<script>alert(1)</script>" * 1000, "reason": "x" * 10**6, "metrics": {"m" * 9999: 1}}),
    ],
    "curves.json": [
        "[" * 900, "[]", '{"train": 3, "val": [[1], [1, 2, 3], ["a", "b"], [1, NaN], [1, 1e999]]}',
        '{"train": [[1e300, 1], [-5, 2]], "val": [[true, null]]}', json.dumps({"val": [[i, i] for i in range(50_000)]}),
    ],
    ".hydra/overrides.yaml": ["[" * 50_000, "a: &a [*a]", "- ${oc.env:CANARY}\n- [1]", "- " + "x" * 90_000],
    "plan.json": ["{}", "[]", '{"jobs": 7, "name": "${oc.env:CANARY}"}', '{"jobs": [{}], "kind": {}}'],
}  # fmt: skip


def test_contents_of_a_folder_are_data(visit: Visit, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    given = [(file, text) for file, texts in HOSTILE.items() for text in texts]
    for n, (file, text) in enumerate(given):
        folder = run(logs, f"train/runs/{n}")
        (folder / file).write_text(text)
        (folder / "0").mkdir()
    client = visit()
    for path in ("/runs", *(f"/run/train/runs/{n}" for n in range(len(given)))):
        answer = client.get(path)
        assert answer.status_code == 200 and SECRET not in answer.text and len(answer.content) < 500_000, path
        assert "<script" not in (answer.json().get("chart") or "")


FILES = ("results.json", "curves.json", ".hydra/overrides.yaml", "plan.json", ".lock")


def test_a_file_that_is_none_is_not_read(visit: Visit, logs: Path) -> None:
    (logs.parent / "secret").write_text(json.dumps({"status": SECRET, "val": [[1, 2], [2, 3]]}))
    given = pairs(FILES, ("pipe", "secret", "itself", "folder", "device"))
    for n, (file, how) in enumerate(given):
        place = run(logs, f"train/runs/{n}") / file
        place.unlink(missing_ok=True)
        if how == "pipe":
            os.mkfifo(place)
        elif how == "folder":
            place.mkdir()
        else:
            place.symlink_to({"secret": logs.parent / "secret", "device": "/dev/zero", "itself": place}[how])
    client = visit()
    for path in ("/runs", *(f"/run/train/runs/{n}" for n in range(len(given)))):
        answer = client.get(path)
        assert answer.status_code == 200 and SECRET not in answer.text, path


def test_a_job_or_a_report_that_is_a_link_is_not_read(visit: Visit, logs: Path) -> None:
    secret = run(logs.parent, "elsewhere/1")
    (secret / "results.json").write_text(json.dumps({"status": SECRET}))
    (logs / "sweep").mkdir()
    (logs / "sweep" / "plan.json").write_text("{}")
    (logs / "sweep" / "0").symlink_to(secret)
    for name in ("00", "٠"):
        (logs / "sweep" / name).mkdir()
    folder, client = run(logs), visit()
    answer = client.get("/run/sweep")
    assert answer.json()["rows"] == [] and answer.json()["chart"] is None
    (secret / "index.html").write_text(SECRET)
    (folder / "report").symlink_to(secret)
    assert client.get("/run/train/runs/a").json()["reports"] == []
    assert client.get("/report/train/runs/a/index.html").status_code == 404


def test_files_that_are_long_are_left_out(visit: Visit, logs: Path) -> None:
    folder, client = run(logs), visit()
    (folder / "results.json").write_text(json.dumps({"status": "completed", "metrics": {"x" * 2_000_000: 1}}))
    (folder / "curves.json").write_text(json.dumps({"val": [[1, 2], [2, 1]], "x": " " * 5_000_000}))
    assert rows(client)[0]["state"] == "unreadable"
    one = client.get("/run/train/runs/a").json()
    assert "too long" in one["reason"] and one["chart"] is None


def test_an_answer_reads_no_more_files_once_it_takes_long(
    visit: Visit, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (logs / "x").mkdir()
    sweep_folder.ablation(logs / "x")
    monkeypatch.setattr(reader, "SECONDS", 0.0)
    one = visit().get("/run/x").json()
    assert len(one["rows"]) == 15 and {row["state"] for row in one["rows"]} == {"unreadable"} and one["chart"] is None


def test_a_report_is_served_and_nothing_beside_it(visit: Visit, logs: Path) -> None:
    folder = run(logs)
    (folder / "report").mkdir()
    (folder / "report" / "index.html").write_text("<script>alert(1)</script>")
    (folder / "report" / "link.html").symlink_to(folder / "results.json")
    (folder / "report" / "program.js").write_text("alert(1)")
    client = visit()
    assert client.get("/run/train/runs/a").json()["reports"] == ["index.html"]
    answer = client.get("/report/train/runs/a/index.html")
    assert answer.status_code == 200 and "text/html" in answer.headers["content-type"]
    policy = answer.headers["content-security-policy"]
    assert "sandbox" in policy and "script" not in policy.replace("allow-scripts", "script")
    for file in ("link.html", "program.js", "../results.json", "..%2fresults.json", "%2e%2e/results.json", "none.html"):
        assert client.get(f"/report/train/runs/a/{file}").status_code == 404
    assert client.get("/report/../a/index.html").status_code == 404


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
def test_two_thousand_runs_are_listed_at_once(tmp_path: Path) -> None:
    for number in range(2_000):
        make(tmp_path / "train" / "runs" / f"{number:05}")
    index = Index(tmp_path)

    def seconds() -> float:
        start = time.process_time()
        assert len(index.newest()) == 2_000
        return time.process_time() - start

    first = seconds()
    again = [(renewed(index), seconds())[1] for _ in range(5)]
    found = [seconds() for _ in range(5)]
    assert first < 0.4 and min(again) < 0.1 and min(found) < 0.01
