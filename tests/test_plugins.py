"""Every folder of plugins/ is a capability that the core neither mentions nor needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = ("registry", "blocks", "training", "lab", "conf")
PLUGINS = sorted(path.parent.name for path in ROOT.glob("plugins/*/__init__.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def mentions(name: str) -> list[str]:
    """The files of the core that name a plug-in, other than as an argument of a library (``planner=``)."""
    files = [path for folder in CORE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml")]
    return [str(path) for path in files if re.search(rf"\b{name}\b(?!=)", path.read_text())]


@pytest.mark.parametrize("name", PLUGINS)
def test_no_file_of_the_core_mentions_it(name: str) -> None:
    assert not mentions(name)


@pytest.mark.parametrize("name", PLUGINS)
def test_it_has_its_page_and_its_tests(name: str) -> None:
    folder = ROOT / "plugins" / name
    assert (folder / "README.md").read_text().startswith("# ")
    assert list((folder / "tests").glob("test_*.py"))
    assert not list((folder / "tests").rglob("__init__.py")), "tests are no part of the package"


def of(name: str, point: str) -> bool:
    """Whether an entry point is of a plug-in."""
    return bool(re.match(rf"blockwright\.plugins\.{name}\b", point))


def without(name: str, folder: Path) -> list[Path]:
    """Copy the project without a plug-in: its folder, what serves Hydra, its entry points.

    Returns:
        what must be on the path, before the packages that the project depends on
    """
    for part in ("src", "plugins", *CORE):
        own = name if part == "plugins" else f"blockwright_{name}"
        left_out = shutil.ignore_patterns("__pycache__", "*.egg-info", "tests", own)
        shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=left_out)
    shutil.copy(ROOT / "train.py", folder)
    metadata = folder / "site" / "blockwright-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: blockwright\nVersion: 0.1.0\n")
    kept = [
        f"[{group}]\n" + "".join(f"{key} = {point}\n" for key, point in points.items() if not of(name, point))
        for group, points in PROJECT["entry-points"].items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(kept))
    return [folder / "src", folder / "site"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PLUGINS)
def test_project_works_without_it(name: str, tmp_path: Path, small: list[str], environment: dict[str, str]) -> None:
    # Without the module ``site``, no .pth file adds this checkout to the path.
    path = [*without(name, tmp_path / "project"), *(p for p in sys.path if p.endswith("site-packages"))]
    variables = {**environment, "PYTHONPATH": ":".join(map(str, path))}

    def blockwright(*words: str) -> str:
        command = [sys.executable, "-S", "-m", "blockwright", *words]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    listed = blockwright("--help")
    lost = [key for key, point in PROJECT["entry-points"]["blockwright.commands"].items() if of(name, point)]
    assert " train " in listed and not any(f"  {key} " in listed for key in lost)
    assert "optimizer:" in blockwright("train", "--cfg", "job")
    assert "validation loss" in blockwright("train", *small, "trainer.max_steps=1", "trainer.val_check_interval=1")
