"""An unrelated Hydra application in the same environment: Hydra imports this project's plug-ins, which do nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

APPLICATION = """
import json, sys
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path="theirs", config_name="config")
def main(cfg):
    print(json.dumps([OmegaConf.to_container(cfg), sorted(sys.modules)]))

main()
"""


@pytest.fixture
def application(tmp_path: Path, environment: dict[str, str]) -> Any:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("size: 1\n")
    (tmp_path / "application.py").write_text(APPLICATION)
    quiet = ["hydra.output_subdir=null", f"hydra.run.dir={tmp_path}"]

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "application.py", *overrides, *quiet]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    return run


def test_it_loads_neither_torch_nor_the_registry(application: Any) -> None:
    done = application("size=2")
    config, modules = json.loads(done.stdout)
    assert config == {"size": 2}
    assert not {"torch", "blockwright.registry", "blockwright.training"} & set(modules)


@pytest.mark.slow
def test_groups_of_blocks_are_unknown_to_it_unless_it_asks_for_them(application: Any) -> None:
    block = "+model/attention=gqa"
    assert "model" not in json.loads(application(block).stdout)[0]
    done = application(block, "hydra.searchpath=['blockwright://']")
    assert json.loads(done.stdout)[0]["model"]["attention"]["name"] == "gqa", done.stderr
