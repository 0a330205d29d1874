"""Every folder of plugins/ is a capability that the core neither mentions nor needs."""

from __future__ import annotations

import ast
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ("registry", "blocks", "training", "lab", "conf")
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/__init__.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_no_file_of_the_core_mentions_one() -> None:
    """Other than as an argument of a library (``planner=``); nor the plug-in of tests/plugin."""
    files = [path for folder in CORE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    word = re.compile(rf"\b(?:{'|'.join(PLUGINS)})\b(?!=)|blockwright_guest")
    assert not [str(path) for path in files if word.search(path.read_text())]


def test_each_has_its_page_and_its_tests() -> None:
    for folder in (ROOT / "plugins" / name for name in PLUGINS):
        assert (folder / "README.md").read_text().startswith("# ")
        assert list((folder / "tests").glob("test_*.py"))
        assert not list((folder / "tests").rglob("__init__.py")), "tests are no part of the package"


def sources(name: str) -> list[Path]:
    """The modules of a plug-in, without its tests."""
    return [file for file in (ROOT / "plugins" / name).rglob("*.py") if "tests" not in file.parts]


def brought(extra: str) -> set[str]:
    """The distributions that an extra installs, those of the extras in it included."""
    names = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        inner = re.match(r"blockwright\[(.+)\]", requirement)
        names |= set().union(*map(brought, inner[1].split(","))) if inner else {distribution(requirement)}
    return names


def distribution(requirement: str) -> str:
    """The normal name of the distribution that a requirement, or its own name, is of."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()  # type: ignore[index]


def required(name: str) -> Iterator[tuple[str, list[str]]]:
    """What a plug-in requires by ``registry.errors.require``: each extra, and packages that it has to bring."""
    for text in (file.read_text() for file in sources(name)):
        for node in ast.walk(ast.parse(text)) if " require(" in text else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require" and node.keywords:
                extra, *packages = (each.value for each in node.args if isinstance(each, ast.Constant))
                yield str(extra), list(map(str, packages))


def test_missing_packages_are_those_of_the_extra_that_the_message_names() -> None:
    distributions = packages_distributions()
    for name in PLUGINS:
        text = "".join(file.read_text() for file in [*sources(name), ROOT / "plugins" / name / "README.md"])
        assert set(re.findall(r"blockwright\[([\w,]+)\]", text)) <= PROJECT["optional-dependencies"].keys()
        for extra, packages in required(name):
            for package in packages:
                owners = {distribution(owner) for owner in distributions.get(package, [package])}
                assert owners & brought(extra), f"{package} is not in the extra {extra}"


def imported(file: Path) -> set[str]:
    """The top-level names that a module imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


CONNECTED = {"alignment": {"vllm"}, "hub": {"transformers", "trl", "lm_eval"}}  # large packages, of extras of their own


@pytest.mark.slow
def test_each_imports_packages_of_the_core_and_of_the_extra_of_its_name() -> None:
    distributions = packages_distributions()
    for name in PLUGINS:
        extras = {name, *CONNECTED.get(name, ())} & PROJECT["optional-dependencies"].keys()
        allowed = set(map(distribution, PROJECT["dependencies"])).union(*map(brought, extras))
        foreign = set().union(*map(imported, sources(name))) - sys.stdlib_module_names - {"blockwright", "yaml"}
        for package in foreign:  # yaml comes with Hydra
            owners = {distribution(owner) for owner in distributions.get(package, [package])}
            assert owners & allowed, f"{package} is in no extra of {name}"


def test_no_test_of_the_core_imports_one() -> None:
    """But for tests/gpu, a program that measures all that is installed."""
    tests = [path for path in (ROOT / "tests").rglob("*.py") if path.parent.name != "gpu" and path != Path(__file__)]
    module = re.compile(rf"blockwright\.plugins\.(?:{'|'.join(PLUGINS)})")
    assert not [path for path in [ROOT / "conftest.py", *tests] if module.search(path.read_text())]


def of(names: list[str], point: str) -> bool:
    """Whether an entry point is of one of these plug-ins."""
    return bool(re.match(rf"blockwright\.plugins\.({'|'.join(names)})\b", point))


def without(names: list[str], folder: Path) -> list[Path]:
    """Copy the project without plug-ins: their folders, what serves Hydra, their entry points.

    Returns:
        what must be on the path, before the packages that the project depends on
    """
    served = [f"blockwright_{name}" for name in names]
    for part in ("src", "plugins", *CORE):
        own = names if part == "plugins" else served
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "tests", *own)
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=left_out)
    shutil.copy(ROOT / "train.py", folder)
    metadata = folder / "site" / "blockwright-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: blockwright\nVersion: 0.1.0\n")
    kept = [
        f"[{group}]\n" + "".join(f"{key} = {point}\n" for key, point in points.items() if not of(names, point))
        for group, points in PROJECT["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(kept))
    return [folder / "src", folder / "site"]


# Each plug-in is in three of six groups, and in others than any other is: of two, each is missing while the other is
# there, so that one that needs another is seen, by as many commands as there are groups.
IN = dict(zip(PLUGINS, itertools.combinations(range(6), 3), strict=False))
GROUPS = [[name for name in PLUGINS if group in IN[name]] for group in range(6)]


@pytest.mark.slow
@pytest.mark.parametrize("names", [PLUGINS, *GROUPS], ids=lambda names: "+".join(names)[:30])
def test_project_works_without_them(names: list[str], tmp_path: Path, small: list[str], environment: Any) -> None:
    """Trains without all of them; without a group, the other commands are there and the configuration composes."""
    # Without the module ``site``, no .pth file adds this checkout to the path.
    path = [*without(names, tmp_path / "project"), *(p for p in sys.path if p.endswith("site-packages"))]
    variables = {**environment, "PYTHONPATH": ":".join(map(str, path))}

    def blockwright(*words: str) -> str:
        command = [sys.executable, "-S", "-m", "blockwright", *words]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    listed = blockwright("--help")
    groups = (points for group, points in PROJECT["entry-points"].items() if group.startswith("blockwright.commands"))
    lost = [key for points in groups for key, point in points.items() if of(names, point)]
    assert " train " in listed and not any(f"  {key} " in listed for key in lost)
    assert "optimizer:" in blockwright("train", "--cfg", "job")
    if names == PLUGINS:
        short = ["trainer.max_steps=1", "trainer.val_check_interval=1"]
        assert "validation loss" in blockwright("train", *small, *short)
