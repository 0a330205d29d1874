"""Help, the catalogue and refusals must not wait for Lightning, nor another Hydra application for this project."""

from __future__ import annotations

import ast
import itertools
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from quickest import quickest

from blockwright.commands import offers

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "blockwright"
BUDGET = 3.0  # CPU-seconds, of which torch alone is one and a half
TORCH = 1.5
COMMANDS = {
    "help": (["train.py", "--help"], 0),
    "catalogue": (["-m", "blockwright.registry"], 0),
    "refusal": (["train.py", "model.attention.n_heads=7"], 64),
    "refusal by Hydra": (["train.py", "model/attention=mlaa"], 64),
}
SLOW = {"lightning", "pytorch_lightning", "torchmetrics", "torch._dynamo", "matplotlib", "tensorboard", "sympy"}
WITHOUT_TORCH = ("blocks", "report", "sweep")
# The help of every command, in one process: which of the slow modules were there after it.
HELP = """
import contextlib, io, json, sys, traceback
from blockwright.command import run

order, slow = json.loads(sys.argv[1])
for name in order:
    said, code = io.StringIO(), None
    sys.argv = ["blockwright", name, "--help"]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = run([name, "--help"]) or 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
    print(json.dumps([name, code, said.getvalue(), sorted({*slow} & {*sys.modules})]), flush=True)
"""


def measured(command: list[str], environment: dict[str, str]) -> tuple[subprocess.CompletedProcess[str], float]:
    """What a command answered, and its CPU-seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_answers_within_its_budget_with_torch_but_neither_lightning_nor_the_compiler(
    name: str, environment: dict[str, str], tmp_path: Path
) -> None:
    arguments, code = COMMANDS[name]
    arguments = [*arguments, *([f"hydra.run.dir={tmp_path}"] if code else [])]
    done, seconds = measured(["-X", "importtime", *arguments], environment)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert done.returncode == code, done.stderr
    assert "torch" in imported and not imported & SLOW
    assert name != "catalogue" or "hydra" not in imported
    assert name != "help" or {"gqa", "deepseek_v2_lite", "fit|validate|test|predict"} <= {
        *done.stdout.replace(",", "").split()
    }
    assert {p.name for p in tmp_path.iterdir()} <= {".hydra", "train.log"}  # Hydra's own, made before any check

    def shares() -> Any:
        """Of its budget. Watched, it is slower than a user has it; a busy machine makes even CPU time longer, by turns,
        so what is over its budget is asked again, unwatched, each time as torch's own import is slower."""
        yield seconds / BUDGET
        for _ in itertools.count():
            slower = max(1.0, measured(["-c", "import torch"], environment)[1] / TORCH)
            yield measured(arguments, environment)[1] / BUDGET / slower

    share = shares()
    assert quickest(lambda: next(share), 1) <= 1


HEAVY = (
    "lightning",
    "torchmetrics",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch._dynamo",
    "matplotlib",
)


def imported_at_once(module: str, seen: dict[str, str]) -> None:
    """Put what a module of this project imports outside of functions, and these modules in turn, into ``seen``."""
    file = SOURCE / Path(*module.split(".")[1:])
    file = file.with_suffix(".py") if file.with_suffix(".py").is_file() else file / "__init__.py"
    for node in ast.parse(file.read_text()).body if file.is_file() else ():
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if name not in seen:
                seen[name] = module
                if name.startswith("blockwright."):
                    imported_at_once(name, seen)


def test_a_refusal_waits_for_no_heavy_module() -> None:
    """Read from the source, which is quick; the answers themselves are slow tests."""
    seen: dict[str, str] = {}
    imported_at_once("blockwright.training.entry.main", seen)
    assert "blockwright.training.entry.start" in seen and "torch" in seen
    assert not {name: by for name, by in seen.items() if f"{name}.".startswith(tuple(f"{each}." for each in HEAVY))}


@pytest.mark.slow
def test_help_of_every_command_needs_no_model(environment: dict[str, str]) -> None:
    order = sorted(offers(), key=lambda name: (name not in WITHOUT_TORCH, name))
    done, _ = measured(["-c", HELP, json.dumps([order, [*SLOW, "torch"]])], environment)
    answers = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert answers.keys() == set(order), done.stderr
    for name, (code, said, imported) in answers.items():
        assert code == 0 and f"blockwright {name}" in said, (name, said)
        assert set(imported) <= (set() if name in WITHOUT_TORCH else {"torch"}), name


# One run with a block swapped: what it loads of this project, which a reader of a stack trace may have to open
SWAP = """
import sys
from blockwright.command import main

overrides = ["model/attention=gqa", "data=sorting", "trainer.max_steps=2", f"paths.log_dir={sys.argv[1]}"]
sys.argv = ["blockwright", "train", *overrides]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + " ".join(name for name in sys.modules if name.partition(".")[0] == "blockwright"))
"""


@pytest.mark.slow
def test_a_run_loads_few_modules_and_none_that_compares_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", SWAP, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.splitlines()[-1].split()
    assert 100 < len(loaded) <= 250
    assert not [name for name in loaded if name.startswith(("blockwright.lab.statistics", "blockwright.lab.ablation"))]


# An unrelated Hydra application in the same environment, for which Hydra imports this project's plug-ins

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


def test_another_application_loads_neither_torch_nor_the_registry(application: Any) -> None:
    config, modules = json.loads(application("size=2").stdout)
    assert config == {"size": 2}
    assert not {"torch", "blockwright.registry", "blockwright.training"} & set(modules)


@pytest.mark.slow
def test_groups_of_blocks_are_unknown_to_it_unless_it_asks_for_them(application: Any) -> None:
    block = "+model/attention=gqa"
    assert "model" not in json.loads(application(block).stdout)[0]
    done = application(block, "hydra.searchpath=['blockwright://']")
    assert json.loads(done.stdout)[0]["model"]["attention"]["name"] == "gqa", done.stderr
