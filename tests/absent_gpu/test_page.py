"""The page of what was tried on GPUs that are not here is made in parts, of one version of torch and Triton."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.absent_gpu import cases, page
from tests.absent_gpu.page import Page, cell


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same versions wherever this runs, also without Triton."""
    monkeypatch.setattr(page, "version", lambda package: "1.0")


BUILT = {"fault": None, "kernels": 45, "shared": 73784, "spilled": 0, "seconds": 1.0}


def test_a_part_takes_the_place_of_its_cells_alone(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    first = Page(path)
    first.put("compiled", "attention/mla", "sm_80", "FAILS: a fault")
    first.put("compiled", "attention/mla", "sm_90", cell(BUILT))
    first.put("attention", "mla, documents", "sm_100", cell(BUILT))
    Page(path).put("compiled", "attention/mla", "sm_80", cell(BUILT))
    figures = "45 · 73,784 · 0"
    known = json.loads(path.with_suffix(".json").read_text())["cells"]
    assert known == {
        "compiled": {"attention/mla": {"sm_80": figures, "sm_90": figures}},
        "attention": {"mla, documents": {"sm_100": figures}},
    }
    assert "FAILS" not in path.read_text() and first.text().count("* Compiled blocks, attention/mla, sm_80") == 1
    assert Page(path).passes("compiled", "attention/mla", "sm_80")
    assert not any(first.passes("compiled", "attention/mla", gpu) for gpu in ("sm_80", "sm_100"))
    assert "Nothing on this page ran on a GPU" in path.read_text()


def test_answers_of_other_versions_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Page(tmp_path / "page.md").put("block", "norm/rmsnorm", "sm_90", "passes")
    monkeypatch.setattr(page, "version", lambda package: "99.0")
    later = Page(tmp_path / "page.md")
    later.put("block", "norm/layernorm", "sm_90", "passes")
    assert "torch 99.0" in later.text() and list(later.cells["block"]) == ["norm/layernorm"]


def test_a_fault_stays_in_its_cell_and_every_check_has_a_section() -> None:
    assert cell({"fault": "Error: a | b\nc" + "d" * 300}) == "FAILS: Error: a b c" + "d" * 188

    assert list(page.SECTIONS) == list(cases.NAMES)
