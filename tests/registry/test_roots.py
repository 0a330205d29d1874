"""Kinds that are no part of a model: rewards of a task, formats of data, whatever a family names as its root."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf

import registry
from blocks.model_config import read
from registry import Composable, ConfigError, Node, RegistrationError, Scope, catalogue, family, register
from registry.__main__ import main, markdown
from registry.hydra import RegistrySource

pytestmark = pytest.mark.usefixtures("temporary_blocks", "rewards")


class Judge(Composable):
    pass


class Reward(Composable):
    pass


class Length(Reward):
    """Rewards short answers.

    Args:
        judge: has a say too
        per_token: what a token costs
    """

    def __init__(self, judge: Judge, per_token: float = 0.5) -> None:
        self.judge, self.per_token = judge, per_token


class Exact(Reward):
    """Rewards the expected answer."""

    def __init__(self) -> None: ...


@pytest.fixture
def rewards(temporary_blocks: None) -> None:
    family("judge", root="task")(Judge)
    family("reward", root="task")(Reward)
    register("reward", "length")(Length)
    register("reward", "exact")(Exact)


SOURCE = RegistrySource("blockwright", "blockwright://")


def test_blocks_are_typed_options_of_their_own_root() -> None:
    assert SOURCE.is_group("task") and SOURCE.is_group("task/reward") and not SOURCE.is_group("model/reward")
    assert SOURCE.list("task", ObjectType.GROUP) == ["judge", "reward"]
    assert SOURCE.list("task/reward", ObjectType.CONFIG) == ["exact", "length"]
    assert not SOURCE.is_config("model/reward/length") and not SOURCE.is_config("task/attention/gqa")
    assert "reward" not in SOURCE.list("model", ObjectType.GROUP)


def test_hydra_composes_and_types_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("defaults: [task/reward: length, _self_]\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        composed = compose("config", overrides=["task.reward.per_token=2"])
        assert OmegaConf.to_container(composed) == {
            "task": {"reward": {"name": "length", "judge": "inherit", "per_token": 2.0}}
        }
        assert compose("config", overrides=["task/reward=exact"]).task.reward == {"name": "exact"}
        with pytest.raises(HydraException, match="per_token=long") as refusal:
            compose("config", overrides=["task.reward.per_token=long"])
        assert "could not be converted to Float" in str(refusal.value.__cause__)
        with pytest.raises(MissingConfigException, match="task/reward/exat"):
            compose("config", overrides=["task/reward=exat"])


def test_glob_sweeps_over_the_registered_names(tmp_path: Path) -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import create_config_search_path
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (tmp_path / "config.yaml").write_text("defaults: [task/reward: length]\n")
    loader = ConfigLoaderImpl(create_config_search_path(str(tmp_path)))
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(["task/reward=glob(*)"])
    assert BasicSweeper.split_arguments(parsed, None) == [[["task/reward=exact"], ["task/reward=length"]]]


def test_they_are_no_part_of_a_model() -> None:
    assert "reward" not in registry.kinds() and registry.kinds("task") == ["judge", "reward"]
    assert {"reward", "attention"} <= set(registry.kinds(None))
    with pytest.raises(ConfigError, match="a model has no such key"):
        read({"vocab_size": 8, "d_model": 8, "n_layers": 1, "reward": "length"})


def test_help_shows_the_option_with_its_root(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["reward/length"])
    shown = capsys.readouterr().out
    assert "python train.py task/reward=length task.reward.per_token=…" in shown and "task.judge" in shown
    main(["reward"])
    assert "task/<kind>=<name>" in capsys.readouterr().out
    main([])
    shown = capsys.readouterr().out
    assert "<root>/<kind>=<name>" in shown and "task/reward/length" in shown and "model/attention/gqa" in shown
    assert "| `task/<kind>=` | names |" in markdown() and "| `reward` | `exact` `length` |" in markdown()


def test_errors_name_the_path_with_its_root() -> None:
    with pytest.raises(ConfigError, match=r"e\.g\. task/reward=<name>"):
        registry.resolve("reward", Node({}, "task.reward"))
    with pytest.raises(ConfigError, match=r"\+task/judge=") as refusal:
        registry.build("reward", Node("length", "task.reward"), Scope({}, {}))
    assert refusal.value.path == "task.judge"


def test_root_that_cannot_be_a_group_is_refused() -> None:
    with pytest.raises(RegistrationError, match="'task/grpo' cannot name a group"):
        family("advantage", root="task/grpo")(type("Advantage", (Composable,), {}))


def test_folder_is_a_family_only_if_its_base_declares_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "hall/base.py": "from registry import *\n@family('hall')\nclass Hall(Composable): pass\n",
        "hall/great.py": "from registry import *\nfrom house_of_a_test.hall.base import Hall\n"
        "@register('hall', 'great')\nclass Great(Hall):\n    def __init__(self) -> None: ...\n",
        "attic/base.py": "class Attic: pass\n",
        "attic/locked.py": "raise RuntimeError('swept in')\n",
    }
    for name, text in files.items():
        file = tmp_path / "house_of_a_test" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(textwrap.dedent(text))
    (tmp_path / "house_of_a_test" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalogue, "BUILTIN", {"house_of_a_test": "house"})
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [])
    catalogue.load.__wrapped__()
    assert registry.names("hall") == ["great"] and registry.lookup("hall", "great").provider == "house"
