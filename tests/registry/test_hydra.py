"""What Hydra sees of the registry: options and their nodes, of a model, of other roots, and of none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf

from blockwright import registry
from blockwright.blocks.compose import read
from blockwright.registry import (
    ROOT,
    Composable,
    ConfigError,
    Node,
    RegistrationError,
    Scope,
    family,
    presets,
    register,
)
from blockwright.registry.__main__ import main
from blockwright.registry.ranges import Count
from hydra_plugins.blockwright_registry.source import RegistrySource

SOURCE = RegistrySource("blockwright", "blockwright://")


def options(group: str) -> list[str]:
    return SOURCE.list(group, ObjectType.CONFIG)


def test_every_block_is_an_option_of_its_kind_every_preset_one_of_model_and_nothing_else_is() -> None:
    for kind in registry.kinds():
        assert SOURCE.is_group(f"model/{kind}") and options(f"model/{kind}") == registry.names(kind)
        assert all(SOURCE.is_config(f"model/{kind}/{name}") for name in registry.names(kind))
    assert options("model") == presets.names()
    assert options("model/qk_norm/of") == ["olmo2_7b", "olmoe_1b_7b", "qwen3_30b_a3b", "qwen3_8b"]
    assert SOURCE.list("model", ObjectType.GROUP) == registry.kinds()
    assert SOURCE.list("model/qk_norm", ObjectType.GROUP) == []  # or help would list every preset once a kind
    assert SOURCE.list("model", None) == sorted([*registry.kinds(), *presets.names()])
    for path in ("", "data/tiny", "model/attention/of/absent", "model/absent", "model/x/of/tiny", "modelx/tiny"):
        assert not SOURCE.is_config(path) and not SOURCE.is_group(path), path


def test_preset_selects_its_blocks_and_each_has_the_presets_values_and_the_blocks_types() -> None:
    for name in presets.names()[::12]:
        model = presets.read(name)
        offered = SOURCE.load_config(f"model/{name}").config
        chosen = [kind for kind in registry.kinds() if kind in model]
        assert offered.pop("defaults") == ["base", *({kind: f"of/{name}"} for kind in chosen), "_self_"]
        assert offered == {key: value for key, value in model.items() if key not in chosen}
        for kind in chosen:
            entry, values = registry.resolve(kind, Node(model[kind], f"model.{kind}"))
            node = SOURCE.load_config(f"model/{kind}/of/{name}").config
            assert OmegaConf.get_type(node) is entry.schema.dataclass and node == {"name": entry.name, **values}


def test_listing_reads_no_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's start may not depend on how many presets there are, or on a broken one."""
    monkeypatch.setattr(presets, "read", None)
    monkeypatch.setattr(presets, "read_text", None)
    for group in ("model", *(f"model/{kind}" for kind in registry.kinds())):
        SOURCE.list(group, None)


# --- kinds that are no part of a model: prizes of a task, formats of data ---------------------------------------------


class Judge(Composable):
    pass


class Prize(Composable):
    pass


class Length(Prize):
    """Honours short answers."""

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


@pytest.mark.usefixtures("prizes")
def test_blocks_of_another_root_are_typed_options_there_and_no_part_of_a_model() -> None:
    assert SOURCE.is_group("fair") and SOURCE.is_group("fair/prize") and not SOURCE.is_group("model/prize")
    assert SOURCE.list("fair", ObjectType.GROUP) == ["judge", "prize"] == registry.kinds("fair")
    assert options("fair/prize") == ["exact", "length"]
    assert not SOURCE.is_config("model/prize/length") and not SOURCE.is_config("fair/attention/gqa")
    assert "prize" not in SOURCE.list("model", ObjectType.GROUP) and "prize" not in registry.kinds()
    assert {"prize", "attention"} <= set(registry.kinds(None))
    with pytest.raises(ConfigError) as refusal:
        read({"vocab_size": 8, "d_model": 8, "n_layers": 1, "prize": "length"})
    assert refusal.value.path == "model.prize"


@pytest.mark.usefixtures("prizes")
def test_hydra_composes_and_types_them_and_sweeps_over_their_names(tmp_path: Path) -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra._internal.utils import create_config_search_path
    from hydra.core.override_parser.overrides_parser import OverridesParser

    searched = "hydra: {searchpath: ['blockwright://']}"  # an application that is not this project's asks for it
    (tmp_path / "config.yaml").write_text(f"defaults: [fair/prize: length, _self_]\n{searched}\n")
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        composed = compose("config", overrides=["fair.prize.per_token=2"])
        expected = {"name": "length", "judge": "inherit", "per_token": 2.0}
        assert OmegaConf.to_container(composed) == {"fair": {"prize": expected}}
        assert compose("config", overrides=["fair/prize=exact"]).fair.prize == {"name": "exact"}
        for override, error in (
            ("fair.prize.per_token=long", HydraException),
            ("fair/prize=ex", MissingConfigException),
        ):
            with pytest.raises(error):
                compose("config", overrides=[override])
    searching = create_config_search_path(str(tmp_path))
    searching.append(provider="blockwright", path="blockwright://")
    parser = OverridesParser.create(config_loader=ConfigLoaderImpl(searching))
    swept = BasicSweeper.split_arguments(parser.parse_overrides(["fair/prize=glob(*)"]), None)
    assert swept == [[["fair/prize=exact"], ["fair/prize=length"]]]


@pytest.mark.usefixtures("prizes")
def test_help_and_errors_name_the_path_with_its_root(capsys: pytest.CaptureFixture[str]) -> None:
    for argument, words in {"prize/length": ["fair/prize=length", "fair.judge"], "prize": ["fair/<kind>"]}.items():
        main([argument])
        shown = capsys.readouterr().out
        assert all(word in shown for word in words), argument
    with pytest.raises(ConfigError, match=r"fair/prize="):
        registry.resolve("prize", Node({}, "fair.prize"))
    with pytest.raises(ConfigError, match=r"\+fair/judge=") as refusal:
        registry.build("prize", Node("length", "fair.prize"), Scope({}, {}))
    assert refusal.value.path == "fair.judge"
    with pytest.raises(RegistrationError):
        family("stall", root="fair/grpo")(type("Stall", (Composable,), {}))


# --- a parameter that takes a dataclass: its fields are settings beside the others ------------------------------------


@dataclass(frozen=True)
class Oven:
    """What every cake takes.

    Args:
        degrees: of Celsius
    """

    kitchen: str
    degrees: Count = 180
    shelves: tuple[int, ...] = (1,)


@pytest.mark.usefixtures("temporary_blocks")
def test_fields_are_settings_the_class_gets_the_dataclass_and_a_kind_at_the_root_is_a_group() -> None:
    class Cake(Composable):
        def __init__(self, oven: Oven, eggs: Count = 3) -> None:
            self.oven, self.eggs = oven, eggs

    def made(**node: Any) -> Any:
        return registry.build("cake", Node({"name": "plain", **node}, "cake"), Scope({}, {"kitchen": "ours"}))

    family("cake", root=ROOT, context=("kitchen",))(Cake)
    register("cake", "plain")(type("Plain", (Cake,), {}))
    schema = registry.lookup("cake", "plain").schema
    assert list(schema.parameters) == ["degrees", "shelves", "eggs"] and schema.context == {"kitchen"}
    assert schema.parameters["degrees"].description == "of Celsius"
    found = made(degrees=200, eggs=2)
    assert (found.oven, found.eggs) == (Oven("ours", 200), 2)
    for node in ({"degrees": 0}, {"degress": 9}, {"kitchen": "x"}):
        with pytest.raises(ConfigError) as caught:
            made(**node)
        assert caught.value.path == f"cake.{next(iter(node))}"
    assert "cake" in registry.kinds(ROOT) and "cake" not in registry.kinds()
    assert SOURCE.list("cake", None) == ["plain"] and SOURCE.is_config("cake/plain")
    node = OmegaConf.to_container(SOURCE.load_config("cake/plain").config)
    assert node == {"name": "plain", "degrees": 180, "shelves": [1], "eggs": 3}
