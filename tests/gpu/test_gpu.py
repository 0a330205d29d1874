"""The script for a GPU that is not here: its own code, at small sizes on a CPU, and what it makes of failures."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.race import FailedError
from blockwright.blocks.kernels import seam
from blockwright.plugins.planner.hardware import hardware
from tests.absent_gpu import cases as absent
from tests.gpu import attention, curves, run, strategies
from tests.gpu.__main__ import main
from tests.gpu.blocks_at_work import PARTS, work
from tests.gpu.decoding import Decoding
from tests.gpu.report import has_failed, write
from tests.gpu.run import Row, Setting
from tests.gpu.sections import SECTIONS, Section
from tests.gpu.speed import Speed, published
from tests.gpu.steps import Steps, forecast

SETTING = Setting("cpu", True, 1)
SECTION = Section("planted", "tests.gpu.kernels:Kernels", 60.0)


class Scripted:
    """Stands for a process that answers each case as its name says."""

    cases: tuple[str, ...] = ()
    begun = 0

    def __init__(self, *_: Any) -> None:
        type(self).begun += 1
        self.killed, self.child, self.dead = threading.Event(), self, False

    def ready(self) -> dict[str, Any]:
        if self.cases == ("no start",):
            raise FailedError("ImportError: nothing here")
        return {"cases": list(self.cases)}

    def ask(self, order: dict[str, str]) -> dict[str, Any]:
        assert not self.dead, "a process that failed is asked again"
        alive = order["case"] == "hangs" and not self.killed.wait(3)
        if order["case"] != "passes" and not alive:
            self.dead = True
            raise FailedError("the process ended with -9" if self.killed.is_set() else "AcceleratorError: illegal")
        return {"result": "pass", "detail": "", "figures": {"ms": 1.5}}

    def kill(self) -> None:
        self.killed.set()

    def end(self) -> None:
        self.dead = True


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Row]]:
    """Rows of a section whose process answers by the names of its cases."""

    def rows(*cases: str, seconds: float = 60.0, **setting: Any) -> list[Row]:
        monkeypatch.setattr(Scripted, "cases", cases)
        monkeypatch.setattr(Scripted, "begun", 0)
        monkeypatch.setattr(run, "Process", Scripted)
        return list(run.run(SECTION._replace(seconds=seconds), SETTING._replace(**setting)))

    return rows


def test_an_error_ends_no_other_case(scripted: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = scripted("passes", "raises", "passes")
    assert [row.result for row in rows] == ["pass", "fail", "pass"]
    assert "illegal" in rows[1].detail and rows[0].figures == {"ms": 1.5}
    assert Scripted.begun == 2  # the memory of the first may be spoilt
    assert [row.case for row in scripted("passes", "raises", only="pass")] == ["passes"]
    (row,) = scripted("no start")
    assert (row.result, row.detail) == ("fail", "ImportError: nothing here")
    assert [row.result for row in scripted("hangs", seconds=0.3)] == ["not reached"]  # it had no time
    monkeypatch.setattr(run, "PATIENCE", 0.0)
    rows = scripted("passes", "hangs", "passes", seconds=0.5)
    assert [row.result for row in rows] == ["pass", "fail", "not reached"] and "killed" in rows[1].detail


def test_the_report_counts_and_names_and_all_sections_end_within_thirty_minutes(tmp_path: Path) -> None:
    assert sum(section.seconds for section in SECTIONS) <= 25 * 60
    rows = [
        Row("speed", "MLA", "pass", "", {"ms": 2.5}, 1.0),
        Row("speed", "MoE", "not reached", "the section's time was up", {}, 0.0),
        Row("kernels", "flex", "not applicable", "does not run on this device", {}, 0.0),
    ]
    about = {"versions": {"torch": "2"}, "device": "H100, driver 570", "threads": 1, "system": "Linux"}
    write(rows, {**about, "date": "2026-11-26", "commit": "c", "load_before": 0, "command": "python"}, tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    assert "H100, driver 570" in text and "| MLA | pass | 2.5 | 1 |" in text
    assert "| speed | 1 | 1 | 0 |" in text and "1 not applicable: does not run on this device" in text
    assert "| flex" not in text
    assert json.loads((tmp_path / "gpu.json").read_text())["raw"]["rows"][1]["result"] == "not reached"
    assert not has_failed(rows) and has_failed([*rows, Row("speed", "x", "fail", "", {}, 0.0)])


@pytest.mark.slow
def test_the_command_tries_kernels_in_a_process(tmp_path: Path) -> None:
    given = ["--sections", "kernels", "--only", "rms_norm/fused", "--out", str(tmp_path), "--threads", "1"]
    assert main(["--device", "cpu", "--small", *given]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["raw"]["rows"]
    assert {row["case"] for row in rows} == {f"rms_norm/fused: rows, {dtype}" for dtype in ("float32", "bfloat16")}
    assert {row["result"] for row in rows} == {"pass"}


def test_without_a_gpu_the_command_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 64
    assert "--device cpu --small" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_attention_at_real_widths_is_held_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    job = attention.Attention(True, "cpu")
    names = {case.split(" · ")[0] for case in job.about()["cases"]}
    assert names == absent.ATTENTIONS.keys()
    case = "256, soft cap, window, documents · flex · float32"
    assert job.turn(case)["result"] == "pass" and job.turn(case)["figures"]["error"] < 1e-6
    assert job.turn("mla, documents · fa3 · bfloat16")["result"] == "not applicable"
    wrong = seam.implementations("attention")["flex"]
    off = seam.Implementation(**{**vars(wrong), "call": lambda *given: 1.01 * wrong.call(*given)})
    monkeypatch.setitem(seam._known["attention"], "flex", off)
    assert job.turn(case)["result"] == "fail"


@pytest.mark.slow
def test_losses_are_held_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = curves.Curves(True, "cpu")
    found = losses.turn("bf16")
    assert found["result"] == "pass" and 0 < found["figures"]["apart"] < 0.01
    assert found["figures"]["last"] < found["figures"]["first"] and len(losses.right) == 5
    monkeypatch.setattr(losses, "losses", lambda *_: [*losses.right[:-1], math.nan])
    assert losses.turn("fp32")["result"] == "fail"
    monkeypatch.setattr(losses, "losses", lambda *_: [*losses.right[:-1], 1.02 * losses.right[-1]])
    assert losses.turn("fp32")["result"] == "fail" and losses.turn("bf16")["result"] == "pass"


@pytest.mark.slow
def test_speed_has_a_row_for_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Speed(True, "cpu")
    cases = job.about()["cases"]
    assert len(cases) == 2 * len(PARTS)
    figures = job.turn(next(case for case in cases if case.startswith("MoE · eager")))["figures"]
    assert figures["ms"] > 0 and figures["MFU"] is None and 0 < figures["of the largest product"] < 10
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    found = published("cuda")
    assert found is not None and found.bf16 == 989e12


def test_flops_of_a_step_are_those_of_its_products() -> None:
    assert work("dense", True, "cpu", False).flops == 3 * 32 * 2 * 3 * 64 * 96
    expected = 3 * 32 * 2 * (3 * 64 * 32 * 3 + 64 * 4)
    assert work("MoE", True, "cpu", False).flops == expected
    assert work("MoE", True, "cpu", False, batch=2).flops == 2 * expected
    scores = 3 * 4 * (16 + 8 + 16) * 2 * 32 * 33 / 2  # heads × widths of keys and values × pairs that are seen
    projections = 3 * 32 * 2 * 64 * (4 * 24 + 24 + 4 * 16) + 3 * 32 * 2 * 16 * 4 * 32
    assert work("MLA", True, "cpu", False).flops == pytest.approx(scores + projections, rel=3e-3)  # 1 × 1 is no product


def test_decoding_reports_tokens_a_second() -> None:
    job = Decoding(True, "cpu")
    decoded, read = job.turn("decode · 16 × 2")["figures"], job.turn("prefill · 16 × 1")["figures"]
    assert decoded["tokens/s"] == pytest.approx(2 / decoded["ms"] * 1e3)
    assert read["tokens/s"] == pytest.approx(16 / read["ms"] * 1e3)
    assert decoded["cache, MB"] == 2 * 16 * (16 + 8) * 2 * 2 / 1e6  # rows × tokens × (C + R) × layers × bytes


def test_strategies_are_held_to_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    job = strategies.Strategies(True, "cpu")
    right = {"losses": [2.0], "weights": {"w": torch.ones(3)}, "extra": 10.0}
    trained: list[tuple[str, int]] = []

    def train(case: str, model: str, ranks: int) -> dict[str, Any]:
        trained.append((case, ranks))
        return right if ranks == 1 or case == "ddp" else {**right, "weights": {"w": torch.full((3,), 1.01)}}

    monkeypatch.setattr(job, "train", train)
    assert [job.turn(case)["result"] for case in ("ddp", "fsdp")] == ["pass", "fail"]
    right["losses"] = [2.0, math.nan]
    assert job.turn("ddp")["result"] == "fail"
    assert trained == [("one", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 2)]
    assert "needs more GPUs than 2" in job.turn("tp_ep")["detail"]


def test_ranks_that_do_not_end_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "PATIENCE", 0.5)
    with pytest.raises(RuntimeError, match=r"ddp on 2: exit code none within 0.5 s: killed"):
        strategies.Strategies(True, "cpu").train("ddp", "dense", 2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fsdp_ep"])
def test_strategies_agree_over_gloo(case: str) -> None:
    assert strategies.Strategies(True, "cpu").turn(case)["result"] == "pass"


@pytest.mark.slow
def test_a_stopped_command_goes_on_with_what_its_report_lacks(tmp_path: Path) -> None:
    given = ["--device", "cpu", "--small", "--sections", "kernels", "--threads", "1", "--out", str(tmp_path)]
    assert main([*given, "--only", "rms_norm/fused: rows, float32"]) == 0
    (first,) = json.loads((tmp_path / "gpu.json").read_text())["raw"]["rows"]
    assert main([*given, "--only", "rms_norm/fused"]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["raw"]["rows"]
    assert rows[0] == first and [row["case"] for row in rows[1:]] == ["rms_norm/fused: rows, bfloat16"]
    found = json.loads((tmp_path / "gpu.json").read_text())
    (tmp_path / "gpu.json").write_text(json.dumps({**found, "about": {**found["about"], "device": "another"}}))
    assert main([*given, "--only", "rms_norm/fused"]) == 64


@pytest.mark.slow
def test_a_whole_step_is_timed_beside_its_forecast() -> None:
    job = Steps(True, "cpu")
    figures = job.turn("smoke · 32 · chosen")["figures"]
    assert figures["ms"] > 0 and figures["forecast, ms"] is None
    assert job.turn("smoke · 32 · liger")["result"] == "not applicable"
    of_h100 = forecast("lite", 2048, hardware("h100"), 0.1)
    assert 10 < of_h100["forecast, ms"] < 1000 and 0.05 < of_h100["MFU"] < 1 and 5 < of_h100["forecast, GB"] < 80  # type: ignore[operator]
