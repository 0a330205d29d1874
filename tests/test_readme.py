"""The README and the examples of command lines are run, not believed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("example", [e for e in EXAMPLES if words(e)[0] not in ("fit", "-m")])
def test_example_composes(example: str, tmp_path: Path) -> None:
    compose_config(words(example), output_dir=str(tmp_path))


def test_sweeps_and_the_cli_are_among_the_examples() -> None:
    assert {words(e)[0] for e in EXAMPLES} >= {"-m", "fit"}


def test_documents_use_commands_that_exist() -> None:
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


def test_ci_sets_up_and_tests_as_the_second_command_does() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2 and commands[0].endswith("train.py")
    set_up, _, tests = commands[1].rpartition(" && ")
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert set_up in lines and f"{tests} || failed=1" in lines


def test_ci_runs_every_check_and_the_tests_last() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    checks = [line.removesuffix(" || failed=1") for line in lines if line.endswith(" || failed=1")]
    tools = ["-m ruff check .", "-m ruff format --check .", "-m mypy", "lint-imports --no-cache"]
    tools += ["-m docs.site", "-m pytest -n 2"]  # the site where its extra is installed
    assert [check.endswith(tool) for check, tool in zip(checks, tools, strict=True)] == [True] * 6
    assert lines[-1] == "exit $failed"


def test_readme_fits_two_screens() -> None:
    assert len(README.splitlines()) <= 100


def test_picture_is_what_its_command_draws() -> None:
    """To renew it, run the command that README gives."""
    drawn = picture(scheme(composition("deepseek_v2"), "deepseek_v2"))
    assert (ROOT / "docs" / "deepseek_v2.svg").read_text() == drawn and "docs/deepseek_v2.svg" in README
