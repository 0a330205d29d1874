"""Kinds that are no part of a model: prizes of a task, formats of data, whatever a family names as its root."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf

from blockwright import registry
from blockwright.blocks.model_config import read
from blockwright.registry import Composable, ConfigError, Node, RegistrationError, Scope, family, register
from blockwright.registry.__main__ import main
from hydra_plugins.blockwright_registry.source import RegistrySource

pytestmark = pytest.mark.usefixtures("temporary_blocks", "prizes")


class Judge(Composable):
    pass


class Prize(Composable):
    pass


class Length(Prize):
    """Honours short answers.

    Args:
        judge: has a say too
        per_token: what a token costs
    """

    def __init__(self, judge: Judge, per_token: float = 0.5) -> None:
        self.judge, self.per_token = judge, per_token


class Exact(Prize):
    """Honours the expected answer."""

    def __init__(self) -> None: ...


@pytest.fixture
def prizes(temporary_blocks: None) -> None:
    family("judge", root="fair")(Judge)
    family("prize", root="fair")(Prize)
    register("prize", "length")(Length)
    register("prize", "exact")(Exact)


SOURCE = RegistrySource("blockwright", "blockwright://")
SEARCHED = "hydra: {searchpath: ['blockwright://']}\n"  # an application that is not this project's asks for it


def test_blocks_are_typed_options_of_their_own_root() -> None:
    assert SOURCE.is_group("fair") and SOURCE.is_group("fair/prize") and not SOURCE.is_group("model/prize")
    assert SOURCE.list("fair", ObjectType.GROUP) == ["judge", "prize"]
    assert SOURCE.list("fair/prize", ObjectType.CONFIG) == ["exact", "length"]
    assert not SOURCE.is_config("model/prize/length") and not SOURCE.is_config("fair/attention/gqa")
    assert "prize" not in SOURCE.list("model", ObjectType.GROUP)


def test_hydra_composes_and_types_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"defaults: [fair/prize: length, _self_]\n{SEARCHED}")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        composed = compose("config", overrides=["fair.prize.per_token=2"])
        assert OmegaConf.to_container(composed) == {
            "fair": {"prize": {"name": "length", "judge": "inherit", "per_token": 2.0}}
        }
        assert compose("config", overrides=["fair/prize=exact"]).fair.prize == {"name": "exact"}
        with pytest.raises(HydraException, match="per_token=long") as refusal:
            compose("config", overrides=["fair.prize.per_token=long"])
        assert "could not be converted to Float" in str(refusal.value.__cause__)
        with pytest.raises(MissingConfigException, match="fair/prize/exat"):
            compose("config", overrides=["fair/prize=exat"])


def test_glob_sweeps_over_the_registered_names(tmp_path: Path) -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import create_config_search_path
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (tmp_path / "config.yaml").write_text("defaults: [fair/prize: length]\n")
    searched = create_config_search_path(str(tmp_path))
    searched.append(provider="blockwright", path="blockwright://")
    loader = ConfigLoaderImpl(searched)
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(["fair/prize=glob(*)"])
    assert BasicSweeper.split_arguments(parsed, None) == [[["fair/prize=exact"], ["fair/prize=length"]]]


def test_they_are_no_part_of_a_model() -> None:
    assert "prize" not in registry.kinds() and registry.kinds("fair") == ["judge", "prize"]
    assert {"prize", "attention"} <= set(registry.kinds(None))
    with pytest.raises(ConfigError, match="a model has no such key"):
        read({"vocab_size": 8, "d_model": 8, "n_layers": 1, "prize": "length"})


def test_help_shows_the_option_with_its_root(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    main(["prize/length"])
    shown = capsys.readouterr().out
    assert "blockwright train fair/prize=length fair.prize.per_token=…" in shown and "fair.judge" in shown
    main(["prize"])
    assert "fair/<kind>=<name>" in capsys.readouterr().out
    main([])
    shown = capsys.readouterr().out
    assert "<root>/<kind>=<name>" in shown and "fair/prize/length" in shown and "model/attention/gqa" in shown


def test_errors_name_the_path_with_its_root() -> None:
    with pytest.raises(ConfigError, match=r"e\.g\. fair/prize=<name>"):
        registry.resolve("prize", Node({}, "fair.prize"))
    with pytest.raises(ConfigError, match=r"\+fair/judge=") as refusal:
        registry.build("prize", Node("length", "fair.prize"), Scope({}, {}))
    assert refusal.value.path == "fair.judge"


def test_root_that_cannot_be_a_group_is_refused() -> None:
    with pytest.raises(RegistrationError, match="cannot name a group"):
        family("stall", root="fair/grpo")(type("Stall", (Composable,), {}))
