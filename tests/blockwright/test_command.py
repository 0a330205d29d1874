"""``blockwright COMMAND``: each command reaches its module; what is no command is refused with a remedy."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from blockwright import commands as offered_commands
from blockwright import completion
from blockwright.command import run, usage
from blockwright.commands import ENTRY_POINTS, command, commands
from blockwright.registry import ConfigError

MODULE = '''"""``blockwright weigh DIR [OVERRIDE …] [--json]``: weigh a folder. More of it."""

raise ImportError("help and completion import nothing")
'''


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Offers commands of other packages beside the project's: name → module; ``weighing`` is one that exists."""
    (tmp_path / "weighing.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = offered_commands.entry_points()
    known = [point for group in found.groups for point in found.select(group=group)]

    def put(**modules: str) -> None:
        points = [EntryPoint(name, f"{module}:main", ENTRY_POINTS) for name, module in modules.items()]
        monkeypatch.setattr(offered_commands, "entry_points", lambda: EntryPoints([*known, *points]))

    return put


def test_arguments_reach_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    run(["blocks", "attention/mqa"])
    assert "attention/mqa" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("word", "remedy"),
    [("descrbe", "Did you mean 'describe'?"), ("model=tiny", "blockwright train model=tiny"), ("fit", "train fit")],
)
def test_what_is_no_command_is_refused(word: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as refused:
        run([word])
    assert remedy in refused.value.remedy


def test_another_package_adds_a_command_that_help_and_completion_know_without_importing_it(offer: Any) -> None:
    offer(weigh="weighing")
    assert command("weigh").about == "weigh a folder"
    assert "  weigh " in usage() and "weigh" in completion.complete(["we"])
    assert "--json" in completion.complete(["weigh", "x", "--"])
    with pytest.raises(ImportError, match="import nothing"):
        run(["weigh"])


def test_each_command_says_its_own_form_and_what_it_does_in_a_line() -> None:
    for name, each in commands().items():
        assert each.form.split()[0] == name and "blockwright" not in each.about and len(each.about) <= 90


def test_help_lists_each_command_once_under_its_heading(offer: Any) -> None:
    offer(weigh="weighing")
    parts = {part.split(":\n")[0]: part for part in usage().split("\n\n")}
    assert [*parts][1:8] == ["compose", "train", "compare", "look", "use", "scale", "more"]
    listed = [line.split()[0] for part in [*parts.values()][1:8] for line in part.splitlines()[1:]]
    assert sorted(listed) == sorted(commands()) and "  train " in parts["train"] and "  weigh " in parts["more"]


def test_name_that_two_packages_offer_is_refused_and_the_others_work(offer: Any, capsys: Any) -> None:
    offer(blocks="weighing", weigh="weighing")
    with pytest.raises(ConfigError, match="blockwright and weighing") as refused:
        run(["blocks"])
    assert refused.value.value == "blocks" and "Uninstall" in refused.value.remedy
    with pytest.warns(UserWarning, match="blocks"):
        assert "  weigh " in usage()


def test_module_that_cannot_be_found_warns_and_is_refused(offer: Callable[..., None]) -> None:
    offer(haunt="a_package_that_is_missing.command")
    with pytest.warns(UserWarning, match="a_package_that_is_missing"):
        assert "haunt" not in commands()
    with pytest.raises(ConfigError, match="cannot be found"):
        run(["haunt"])


def test_train_becomes_the_module_for_the_ranks_that_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from blockwright import train

    seen = []
    monkeypatch.setattr(train.entry, "main", lambda: seen.append((list(sys.argv), sys.modules["__main__"].__spec__)))
    monkeypatch.setattr(sys, "argv", ["blockwright", "train", "seed=1"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", object(), raising=False)
    run(["train", "seed=1"])
    assert seen == [([train.__file__, "seed=1"], train.__spec__)]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("de", {"describe"}),
        ("describe model=tiny model/attention=ml", {"model/attention=mla"}),
        ("describe model=llama2_1", {"model=llama2_13b"}),
        ("train optimizer=muon_t", {"optimizer=muon_tiny"}),
        ("train model/att", {"model/attention="}),
        ("train task_n", {"task_name="}),
        ("train sched", {"scheduler=", "scheduler.", "scheduler/"}),
        ("train task/reward=exact", {"task/reward=exact_match"}),
        ("blocks attention/ml", {"attention/mla"}),
        ("generate RUN --pr", {"--prompt"}),
        ("ablate NAME --pl", {"--plan-only"}),
        ("sweep st", {"status", "stop"}),
        ("sweep status ", set()),
    ],
)
def test_completion_offers_what_begins_so(words: str, expected: set[str]) -> None:
    assert set(completion.complete(words.split(" "))) == expected


@pytest.mark.slow
def test_completion_in_bash_offers_keys_of_what_the_words_compose() -> None:
    bash = shutil.which("bash")
    assert bash, "bash runs the completion"
    program = Path(sys.executable).with_name("blockwright")
    words = "train model/attention=mla model.attention.kv_l"
    typed = f"COMP_WORDS=({program} {words}); COMP_CWORD={len(words.split())}"
    script = f'{completion.SCRIPT}\n{typed}; _blockwright; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run([bash, "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["model.attention.kv_lora_rank="], done.stderr


def test_completion_waits_for_torch_only_where_blocks_answer(environment: dict[str, str]) -> None:
    words = [["de"], ["train", "optimizer=mu"], ["train", "mod"], ["generate", "RUN", "--pr"]]
    code = f"import sys\nfrom blockwright.completion import complete\nassert all(map(complete, {words}))\n"
    code += "sys.exit('torch' in sys.modules or 'hydra' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_installation_older_than_the_source_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offered_commands, "entry_points", lambda: EntryPoints([]))
    for words in ([], ["describe", "model=tiny"]):
        with pytest.raises(ConfigError) as refused:
            run(words)
        assert "pip install -e ." in refused.value.remedy
