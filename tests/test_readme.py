"""The README, the examples of command lines and the tutorial are run, not believed."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from warm import Warm

from blockwright.commands import offers
from blockwright.lab.drawing.picture import picture
from blockwright.lab.drawing.scheme import scheme
from blockwright.lab.models import composition
from blockwright.training.configuration.composing import compose_config

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MORE = (ROOT / "docs" / "reference" / "examples.md").read_text()
EXAMPLES = list(dict.fromkeys(re.findall(r"^blockwright train (.+)$", README + MORE, re.M)))
OF_THE_SITE = ROOT / "docs" / "site"  # its pages link to generated ones: tests/docs/test_build.py
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").rglob("*.md")) if not path.is_relative_to(OF_THE_SITE)),
    *sorted((ROOT / "plugins").rglob("*.md")),
]


def words(example: str) -> list[str]:
    return shlex.split(example, comments=True)


@pytest.mark.slow
def test_examples_compose(tmp_path: Path) -> None:
    assert {words(example)[0] for example in EXAMPLES} >= {"-m", "fit"}
    for example in EXAMPLES:
        if words(example)[0] not in ("fit", "-m"):
            compose_config(words(example), output_dir=str(tmp_path))


def test_documents_use_commands_that_exist_and_the_readme_fits_two_screens() -> None:
    assert len(README.splitlines()) <= 100
    used = {name for d in DOCUMENTS for name in re.findall(r"^blockwright ([a-z-]+)", d.read_text(), re.M)}
    assert used and used <= set(offers())


def test_documents_link_to_files_that_exist() -> None:
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)|src=\"([^\"]+)\"", text):
            path = "".join(target)
            assert "://" in path or (document.parent / path).exists(), f"{document}: {path}"


def test_python_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code
    names: dict = {}
    exec(code[1], names)
    assert names["logits"].shape == (2, 100, 256)


def test_picture_is_what_its_command_draws() -> None:
    """To renew it, run the command that README gives."""
    drawn = picture(scheme(composition("deepseek_v2"), "deepseek_v2"))
    assert (ROOT / "docs" / "deepseek_v2.svg").read_text() == drawn and "docs/deepseek_v2.svg" in README


BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S)
_, *COMMANDS = "".join(BLOCKS).splitlines()


@pytest.mark.slow
def test_every_command_of_the_tutorial_runs(small: list[str], warm: Warm, environment: Any, tmp_path: Path) -> None:
    smaller = [s for s in small if not s.startswith("trainer.max_steps")]
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "curl":  # what it gets is replaced by ``small``
            continue
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


def test_ci_runs_every_check_and_what_the_second_command_runs_last() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2 and commands[0].endswith("train.py")
    set_up, _, tests = commands[1].rpartition(" && ")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    checks = [line.removesuffix(" || failed=1") for line in lines if line.endswith(" || failed=1")]
    tools = ["-m ruff check .", "-m ruff format --check .", "-m mypy", "lint-imports --no-cache", "-m docs.site"]
    assert set_up in lines and all(check.endswith(tool) for check, tool in zip(checks, [*tools, tests], strict=True))
    assert lines[-1] == "exit $failed"
