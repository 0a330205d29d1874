"""Commands that the project prints are accepted as they stand, from folders of any name."""

from __future__ import annotations

import ast
import functools
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from blockwright.blocks.compose import compose
from blockwright.command import run
from blockwright.commands import offers
from blockwright.lab.sweep import plan as plans
from blockwright.registry.command import quoted, run_command
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.conf import CONF
from blockwright.training.entry.preflight import preflight

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
CODE = ("registry", "blocks", "training", "lab", "plugins", "src")
ODD = "it's my [first], $HOME=1 {a: b}"  # the name of a folder that means something to the shell and to Hydra


@pytest.fixture(scope="module")
def odd(tiny: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its composition, in a folder of an odd name."""
    folder = tmp_path_factory.mktemp("printed") / ODD
    (folder / "run" / "checkpoints").mkdir(parents=True)
    decoder = compose(tiny(vocab_size=257), seed=7)
    weights = {f"decoder.{k}": v for k, v in decoder.state_dict().items()}
    checkpoint = {"state_dict": weights, "hyper_parameters": {"model": decoder.config}}
    torch.save(checkpoint, folder / "run" / "checkpoints" / "last.ckpt")
    (folder / "model.yaml").write_text(OmegaConf.to_yaml(tiny(vocab_size=257, max_positions=512)))
    return folder


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """The command that a command prints: the last line's from its program on."""

    def call(*words: str) -> list[str]:
        assert run_command(run, words) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        (found,) = re.findall(r"blockwright .*$", last)
        return shlex.split(found)

    return call


@pytest.fixture
def trains(small: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The words of a printed training after its program, checked as a run checks them."""

    def check(words: list[str], program: tuple[str, ...] = ("blockwright", "train")) -> dict[str, Any]:
        assert tuple(words[:2]) == program
        given = [o for o in small if not o.startswith("model.")]
        return preflight(compose_config([*given, *words[2:], "trainer.accelerator=cpu"], output_dir=str(tmp_path)))

    return check


@pytest.mark.skipif("surgery" not in offers(), reason="no package offers blockwright surgery")
def test_the_command_of_surgery(odd: Path, tmp_path: Path, printed: Any, trains: Any) -> None:
    out = tmp_path / ODD
    plain = trains(printed("surgery", str(odd / "run"), "model/attention=mha", "--out", str(out)))
    assert plain["init_from"] == str(out) and plain["model"]["attention"]["name"] == "mha"


HERE = ("gpu=h100", "length=32", "micro_batch=1", "tensor=1", "pipeline=1", "context=1", "shard=true")


@pytest.mark.skipif("plan" not in offers(), reason="no package offers blockwright plan")
@pytest.mark.parametrize(("model", "gpus"), [("model.yaml", 12), ("run", 7)])
def test_the_command_of_a_plan(odd: Path, model: str, gpus: int, printed: Any, trains: Any) -> None:
    named = str(odd / model)
    words = printed("plan", f"model={named}", f"gpus={gpus}", *HERE)
    plain = trains(words, ("blockwright", "train"))
    assert plain["trainer"]["devices"] * plain["trainer"]["num_nodes"] == gpus
    assert plain["init_from"] == (named if model == "run" else None)


@pytest.mark.skipif("plan" not in offers(), reason="no package offers blockwright plan")
def test_a_plan_says_what_its_command_lacks(odd: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", f"model={odd / 'run'}", "model.n_layers=4", "gpus=8", *HERE]
    assert run_command(run, words) == 0
    assert "a run refuses this: init_from has other weights" in capsys.readouterr().out


def test_the_command_of_an_ablation(tmp_path: Path, small: list[str], printed: Callable[..., list[str]]) -> None:
    arms = {"one": "model/attention=mha", "two": "model/attention=mqa"}
    mine = {"about": "heads", "baseline": "one", "arms": arms, "metric": "val/loss", "seeds": 1, "tokens": 640}
    (tmp_path / "mine.yaml").write_text(OmegaConf.to_yaml(mine))
    given = [str(tmp_path / "mine.yaml"), *small, f"paths.log_dir={quoted(tmp_path / ODD)}"]
    words = printed("ablate", *given, "--plan-only")
    assert words[:3] == ["blockwright", "sweep", "resume"] and plans.read(Path(words[3]))["kind"] == "ablation"


# --- in messages ------------------------------------------------------------------------------------------------------


def _texts() -> Iterator[tuple[str, str]]:
    """Where and what: every text of the code but docstrings, with {} for what is filled in."""
    for file in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        tree = ast.parse(file.read_text())
        parts = {id(value) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for value in node.values}
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in parts or id(node) in told:
                continue
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            else:
                continue
            yield f"{file.relative_to(ROOT)}:{node.lineno}", text


COMMAND = re.compile(r"(?<!\$\()\b(blockwright) ([\w-][^;`\n()]*)")


@pytest.fixture(scope="module")
def texts() -> list[tuple[str, str]]:
    return [*_texts()]


VALUES = {"RUN", "OUT", "DIR", "FILE", "NAME", "TASKS", "MODEL", "{}", "…", "N", "KIND"}  # given by the reader


@functools.cache
def _flags(name: str) -> set[str]:
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        run_command(run, [name, "--help"])
    return set(re.findall(r"--[a-z][\w-]*", said.getvalue()))


def test_a_command_in_a_message_exists_with_its_flags(texts: list[tuple[str, str]]) -> None:
    mentioned = [(where, rest) for where, text in texts for _, rest in COMMAND.findall(text)]
    wrong = []
    for where, rest in mentioned:
        name, *words = rest.replace(":", " ").replace(",", " ").split()
        if name == "COMMAND":
            continue
        flags = {re.split(r"[=)\]]", word.lstrip("[("))[0] for word in words if word.lstrip("[(").startswith("--")}
        unknown = flags - {"--", "--help"} if name != "train" else set()
        if name not in offers() or (unknown and not unknown <= _flags(name)):
            wrong.append(f"{where}: blockwright {rest}")
    assert len(mentioned) > 60 and not wrong


OVERRIDE = re.compile(r"(?<![\w.~+/{}\[-])~?[a-z_]+(?:[./][a-z_]+)*=[a-z0-9_]+(?![\w.{}\[*])")
CHOICES = r"(model|task|data|trainer|experiment|callbacks|logger)(/\w+)?="


def test_choices_in_messages_are_there(texts: list[tuple[str, str]]) -> None:
    """Others are values, which their own tests write."""
    asking = [text for _, text in texts if re.search(r"\b(Write|Add|Leave|blockwright train|Use|or)\b", text)]
    groups = {word for text in asking for word in OVERRIDE.findall(text) if re.match(CHOICES, word)}
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for group, _, name in (word.partition("=") for word in sorted(groups)):
            options = loader.get_group_options(group)
            assert not options or name in options, f"{group}={name} is in a message"
            assert options or "/" not in group, f"{group} is in a message"
    assert len(groups) > 20
