"""Runs, sweeps and reports as the page shows them; what a hostile folder holds is data."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sweep_folder
from starlette.testclient import TestClient

from blockwright.plugins.studio import reader
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


@pytest.mark.parametrize(
    ("file", "text"), [(file, text) for file, texts in HOSTILE.items() for text in texts], ids=lambda x: x[:40]
)
def test_contents_of_a_folder_are_data(
    file: str, text: str, visit: Visit, logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY", SECRET)
    folder = run(logs)
    (folder / file).write_text(text)
    (folder / "0").mkdir()
    client = visit()
    for path in ("/runs", "/run/train/runs/a"):
        answer = client.get(path)
        assert answer.status_code == 200 and SECRET not in answer.text and len(answer.content) < 500_000
        assert "<script" not in (answer.json().get("chart") or "")


@pytest.mark.parametrize("file", ["results.json", "curves.json", ".hydra/overrides.yaml", "plan.json", ".lock"])
@pytest.mark.parametrize("how", ["pipe", "link to a secret", "link to itself", "folder", "link to a device"])
def test_a_file_that_is_none_is_not_read(file: str, how: str, visit: Visit, logs: Path) -> None:
    folder = run(logs)
    (logs.parent / "secret").write_text(json.dumps({"status": SECRET, "val": [[1, 2], [2, 3]]}))
    place = folder / file
    place.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(place)
    elif how == "folder":
        place.mkdir()
    else:
        place.symlink_to({"link to a secret": logs.parent / "secret", "link to a device": "/dev/zero"}.get(how, place))
    client = visit()
    for path in ("/runs", "/run/train/runs/a"):
        answer = client.get(path)
        assert answer.status_code == 200 and SECRET not in answer.text


@pytest.mark.parametrize("name", ["0", "00", "٠"])
def test_a_job_that_is_a_link_is_not_read(name: str, visit: Visit, logs: Path) -> None:
    secret = run(logs.parent, "elsewhere/1")
    (secret / "results.json").write_text(json.dumps({"status": SECRET}))
    (logs / "sweep").mkdir()
    (logs / "sweep" / "plan.json").write_text("{}")
    (logs / "sweep" / "0").symlink_to(secret)
    (logs / "sweep" / name).mkdir(exist_ok=True)
    answer = visit().get("/run/sweep")
    assert answer.json()["rows"] == [] and answer.json()["chart"] is None


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


def test_a_report_that_is_a_link_is_not_served(visit: Visit, logs: Path) -> None:
    folder = run(logs)
    (logs.parent / "elsewhere").mkdir()
    (logs.parent / "elsewhere" / "index.html").write_text(SECRET)
    (folder / "report").symlink_to(logs.parent / "elsewhere")
    client = visit()
    assert client.get("/run/train/runs/a").json()["reports"] == []
    assert client.get("/report/train/runs/a/index.html").status_code == 404
