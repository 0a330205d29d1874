"""Both wheels in an environment of their own, outside both checkouts: found, typed, trained, reported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]
USER = """\
from blockwright_asap.study import Settings
settings = Settings(seed=1, gap="both")
reveal_type(settings.robots)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment ``env``: nothing but the two wheels is installed.

    What they depend on is taken from this environment's site-packages by a path, to download nothing. Neither checkout
    is on it: editable installs are found by .pth files, which are not read there.
    """
    folder = tmp_path_factory.mktemp("wheel")
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*wheel, str(ROOT), str(ROOT / "packages" / "asap")], check=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    wheels = sorted(map(str, folder.glob("*.whl")))
    assert len(wheels) == 2
    run(folder, "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", *wheels)
    (site,) = folder.glob("env/lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(folder: Path, program: str, *words: str, fails: bool = False) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(folder / "env" / "bin" / program), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=clean)
    assert bool(done.returncode) == fails, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_it_is_found(place: Path) -> None:
    said = run(place, "python", "-c", "import blockwright as b, blockwright_asap as a; print(b.__file__, a.__file__)")
    assert all(str(place / "env") in file for file in said.split())
    assert "asap_delta" in run(place, "blockwright", "ablate")
    assert "sysid_delta" in run(place, "python", "-m", "blockwright_asap", "--help")


def test_it_is_typed(place: Path) -> None:
    (place / "user.py").write_text(USER)
    check = ["-m", "mypy", "--python-executable", str(place / "env" / "bin" / "python"), "user.py"]
    right = subprocess.run([sys.executable, *check], capture_output=True, text=True, cwd=place)
    assert 'Revealed type is "int"' in right.stdout.replace("builtins.", "") and "Success" in right.stdout, right.stdout
    (place / "user.py").write_text(USER.replace("seed=1", "seed='1'"))
    wrong = subprocess.run([sys.executable, *check], capture_output=True, text=True, cwd=place)
    assert 'incompatible type "str"; expected "int"' in wrong.stdout


def test_it_trains_and_reports(place: Path) -> None:
    words = ["experiment=asap_delta", "model/attention=mla", "data.base=sysid", "hydra.run.dir=run", "logger=csv"]
    words += [f"data.{name}=1" for name in ("iterations", "episodes", "held_out")]
    run(place, "blockwright", "train", *words, "trainer.max_steps=4", "trainer.val_check_interval=2")
    report = json.loads((place / "run" / "results.json").read_text())
    assert report["status"] == "completed" and report["metrics"]["val/replay_1s"] > 0


def test_its_study_reports(place: Path) -> None:
    small = ["--seeds", "0", "--tune", "1", "--iterations", "1", "--methods", "simulator,sysid,real"]
    run(place, "python", "-m", "blockwright_asap", *small)
    report = (place / "logs" / "asap" / "both" / "report.md").read_text()
    assert "identified with wide bounds" in report and (place / "logs" / "asap" / "both" / "open_loop.svg").exists()
