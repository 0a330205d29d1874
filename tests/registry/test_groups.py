"""A parameter that takes a dataclass: its fields are settings beside the others; and kinds at the root."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from omegaconf import OmegaConf

from blockwright import registry
from blockwright.registry import ROOT, Composable, ConfigError, Node, Scope, family, register
from blockwright.registry.ranges import Count
from hydra_plugins.blockwright_registry.source import RegistrySource

pytestmark = pytest.mark.usefixtures("temporary_blocks")


@dataclass(frozen=True)
class Oven:
    """What every cake takes.

    Args:
        kitchen: where it stands
        degrees: of Celsius
        shelves: which are used
    """

    kitchen: str
    degrees: Count = 180
    shelves: tuple[int, ...] = (1,)


@pytest.fixture
def cake() -> type[Any]:
    class Cake(Composable):
        def __init__(self, oven: Oven, eggs: Count = 3) -> None:
            self.oven, self.eggs = oven, eggs

    family("cake", root=ROOT, context=("kitchen",))(Cake)
    return register("cake", "plain")(type("Plain", (Cake,), {}))


def made(**node: Any) -> Any:
    return registry.build("cake", Node({"name": "plain", **node}, "cake"), Scope({}, {"kitchen": "ours"}))


def test_fields_are_settings_and_the_class_gets_the_dataclass(cake: type[Any]) -> None:
    schema = registry.lookup("cake", "plain").schema
    assert list(schema.parameters) == ["degrees", "shelves", "eggs"] and schema.context == {"kitchen"}
    assert schema.parameters["degrees"].description == "of Celsius"
    found = made(degrees=200, eggs=2)
    assert (found.oven, found.eggs) == (Oven("ours", 200), 2)


@pytest.mark.parametrize("node", [{"degrees": 0}, {"degress": 9}, {"kitchen": "x"}])
def test_mistakes_in_fields_are_refused_like_others(cake: type[Any], node: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        made(**node)
    assert caught.value.path == f"cake.{next(iter(node))}"


def test_kind_at_the_root_is_a_group_of_its_own(cake: type[Any]) -> None:
    source = RegistrySource("blockwright", "blockwright://")
    assert "cake" in registry.kinds(ROOT) and "cake" not in registry.kinds()
    assert source.list("cake", None) == ["plain"] and source.is_config("cake/plain")
    node = OmegaConf.to_container(source.load_config("cake/plain").config)
    assert node == {"name": "plain", "degrees": 180, "shelves": [1], "eggs": 3}
