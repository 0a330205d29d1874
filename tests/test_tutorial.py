"""Every command of the tutorial is run, in order, on a small model and text."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from warm import Warm

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
SET_UP, *COMMANDS = "".join(BLOCKS).splitlines()


def test_tutorial_sets_up_as_the_readme_does() -> None:
    assert SET_UP.rpartition(" && ")[0] in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(
    small: list[str], warm: Warm, environment: dict[str, str], tmp_path: Path
) -> None:
    smaller = [s for s in small if not s.startswith("trainer.max_steps")]
    for command in COMMANDS:
        words = shlex.split(command)
        variables = {**environment, "PYTHONPATH": str(ROOT)}
        while re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words[:2] == ["blockwright", "train"]:
            arguments = [w.replace("max_steps=100", "max_steps=6") for w in words[2:]]
            run = warm.run(str(ROOT / "train.py"), *arguments, *smaller, cwd=tmp_path, env=variables)
        elif words[0] == "blockwright":
            run = warm.run("-m", *words, cwd=tmp_path, env=variables)
        else:
            run = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
        assert run.returncode == 0, f"{command}\n{run.stdout}\n{run.stderr}"
    runs = tmp_path / "logs" / "tutorial"
    assert all((runs / name / "results.json").is_file() for name in ("mla", "gqa", "mine", "sweep/0", "sweep/3"))
    assert (runs / "sweep" / "report" / "index.html").is_file()
