"""Another distribution adds a skill, which data, training and measuring know without a change of this project."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from warm import Warm

from tests.test_plugin import install, run

MODULE = Path(__file__).parent / "another" / "parity_skill.py"
PROJECT = {
    "name": "parity-skill",
    "version": "0.1.0",
    "entry-points": {"blockwright.blocks": {"parity": "parity_skill"}},
}


@pytest.mark.slow
def test_a_skill_of_another_package_is_trained_and_measured(
    small: list[str], warm: Warm, environment: dict[str, str], tmp_path: Path
) -> None:
    site, folder = tmp_path / "site", tmp_path / "run"
    site.mkdir()
    shutil.copy(MODULE, site)
    install(site, PROJECT)
    of_run = [each for each in small if not each.startswith(("data", "model"))]
    chosen = ["experiment=skills", *of_run, "callbacks.skills.samples=8", "data.held_out=8", "test=false"]
    commands = {
        "trained": [*chosen, "data.skill=[parity,{name: recall, difficulty: 2}]", f"hydra.run.dir={folder}"],
    }
    said = run(warm, commands, site, environment, tmp_path)
    assert said["trained"][0] == 0, said["trained"][1]
    parity, recall = json.loads((folder / "skills.json").read_text())["skills"]
    assert (parity["skill"], parity["unit"], recall["skill"]) == ("parity", "bits", "recall")
    assert [level["difficulty"] for level in parity["levels"]] == [1, 2, 4, 8]
    metrics = json.loads((folder / "results.json").read_text())["metrics"]
    assert metrics["skills/parity"] == parity["levels"][-1]["right"] / 8
