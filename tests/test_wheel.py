"""The wheel in an environment of its own, used from a repository whose packages have the names of our folders.

The repository has ``blocks``, ``registry``, ``training``, ``lab`` and so on, stands first on the path, and each raises
when it is imported.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]
ROOT = Path(__file__).resolve().parent.parent
LINKED = [link.name for link in (ROOT / "src" / "blockwright").iterdir() if link.is_symlink()]
NOT_SOURCE = {".git", ".venv", "build", "dist", "logs", "data"}  # at the top
SMALL = [
    *("model.n_layers=1", "model.d_model=32", "model.max_positions=64", "data.sequence_length=32", "data.batch_size=2"),
    *("data=text", "data.corpus.files=text.txt", "data.eval_batch_size=4", "data.eval_windows=2", "test=false"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.report=null", "logger=none"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"

    def left_out(place: str, names: list[str]) -> set[str]:
        generated = {name for name in names if name == "__pycache__" or name.endswith(".egg-info")}
        return generated | (NOT_SOURCE & set(names) if Path(place) == ROOT else set())

    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(source)], check=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def repository(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's repository with the environment ``env``, in which nothing but the wheel is installed.

    What it depends on is taken from this environment's site-packages by a path, to download nothing.
    """
    folder = tmp_path_factory.mktemp("repository")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    run(folder, "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel))
    (site,) = folder.glob("env/lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for name in LINKED:
        package = folder / name if name.endswith(".py") else folder / name / "__init__.py"
        package.parent.mkdir(exist_ok=True)
        package.write_text(f"raise RuntimeError('the user has a {name} too')\n")
    (folder / "text.txt").write_text("to be or not to be, that is the question.\n" * 400)
    return folder


def run(folder: Path, program: str, *words: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [str(folder / "env" / "bin" / program), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_top_level_names_of_the_wheel(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"blockwright", "hydra_plugins"}


def test_wheel_holds_every_file_that_is_no_test(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    kinds = (".py", ".yaml", ".css", ".j2", ".pyi", ".typed")
    for top in (ROOT / "src" / "blockwright").iterdir():
        files = [top] if top.is_file() else top.resolve().rglob("*")
        for file in files:
            below = () if top.is_file() else file.relative_to(top.resolve()).parts
            if file.suffix in kinds and file.is_file() and "tests" not in below:
                assert "/".join(["blockwright", top.name, *below]) in held


def test_sweeps_by_joblib_with_ranks(repository: Path) -> None:
    """A launcher, a worker of its own, and the worker's second rank: each finds the wheel."""
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    ranks = ["trainer.devices=2", "trainer.strategy=ddp"]
    run(repository, "blockwright", "train", "-m", *SMALL, *joblib, *ranks, "seed=1", "hydra.sweep.dir=sweep")
    with (repository / "sweep" / "summary.csv").open(newline="") as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["completed"]


def test_ablates(repository: Path) -> None:
    arms = "{heads: [model/attention=mha], one: [model/attention=mqa]}"
    definition = f"about: heads\nbase: {json.dumps(SMALL)}\nbaseline: heads\narms: {arms}\n"
    (repository / "mine.yaml").write_text(definition)
    run(repository, "blockwright", "ablate", "mine.yaml", "paths.log_dir=logs", "seeds=1", "tune=null")
    results = [json.loads(file.read_text()) for file in repository.glob("logs/ablation/**/results.json")]
    assert [result["status"] for result in results] == ["completed"] * 2


def test_a_new_repository_passes_its_checks_and_trains(repository: Path) -> None:
    run(repository, "blockwright", "new", "studies/ours")
    ours = repository / "studies" / "ours"
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(repository)]
    subprocess.run([*build, str(ours)], check=True)
    (built,) = repository.glob("ours-*.whl")
    run(repository, "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(built))
    run(repository, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(ours), str(ours))
    small = ["trainer.max_steps=2", "trainer.val_check_interval=2", "test=false", f"paths.log_dir={ours}/logs"]
    folder = ["--config-dir", str(ours / "conf")]
    run(repository, "python", "-m", "blockwright", "train", "experiment=first", *small, *folder)
    results = json.loads(next(ours.glob("logs/first/runs/*/results.json")).read_text())
    assert results["status"] == "completed"
    said = run(repository, "blockwright", "ablate", "first", "--plan-only", f"paths.log_dir={ours}/logs", *folder)
    assert "tied" in said and "6 jobs" in said
