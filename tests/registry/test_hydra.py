"""What Hydra sees of the registry: options, their nodes, and that listing them reads no preset."""

from __future__ import annotations

import pytest
from hydra.core.object_type import ObjectType
from omegaconf import OmegaConf

from blockwright import registry
from blockwright.registry import Node, presets
from blockwright.registry.hydra import include_config_dir
from hydra_plugins.blockwright_registry.source import RegistrySource

SOURCE = RegistrySource("blockwright", "blockwright://")


def options(group: str) -> list[str]:
    return SOURCE.list(group, ObjectType.CONFIG)


def test_every_registered_block_is_an_option_of_its_kind_and_nothing_else_is() -> None:
    for kind in registry.kinds():
        assert SOURCE.is_group(f"model/{kind}")
        assert options(f"model/{kind}") == registry.names(kind)
        assert all(SOURCE.is_config(f"model/{kind}/{name}") for name in registry.names(kind))


def test_every_preset_is_an_option_of_model_and_its_blocks_of_their_kinds() -> None:
    assert options("model") == presets.names()
    assert options("model/qk_norm/of") == ["olmo2_7b", "olmoe_1b_7b", "qwen3_30b_a3b", "qwen3_8b"]
    assert SOURCE.list("model", ObjectType.GROUP) == registry.kinds()
    assert SOURCE.list("model/qk_norm", ObjectType.GROUP) == []  # or help would list every preset once a kind
    assert SOURCE.list("model", None) == sorted([*registry.kinds(), *presets.names()])


@pytest.mark.parametrize(
    "path", ["", "data/tiny", "model/attention/of/absent", "model/absent", "model/x/of/tiny", "modelx/tiny"]
)
def test_nothing_else_is_offered(path: str) -> None:
    assert not SOURCE.is_config(path) and not SOURCE.is_group(path)


@pytest.mark.parametrize("name", presets.names()[::8])
def test_preset_selects_its_blocks_and_each_has_the_presets_values_and_the_blocks_types(name: str) -> None:
    model = presets.read(name)
    offered = SOURCE.load_config(f"model/{name}").config
    chosen = [kind for kind in registry.kinds() if kind in model]
    assert offered.pop("defaults") == ["base", *({kind: f"of/{name}"} for kind in chosen), "_self_"]
    assert offered == {key: value for key, value in model.items() if key not in chosen}
    for kind in chosen:
        entry, values = registry.resolve(kind, Node(model[kind], f"model.{kind}"))
        node = SOURCE.load_config(f"model/{kind}/of/{name}").config
        assert OmegaConf.get_type(node) is entry.schema.dataclass
        assert node == {"name": entry.name, **values}


def test_listing_reads_no_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's start may not depend on how many presets there are, or on a broken one."""
    monkeypatch.setattr(presets, "read", None)
    monkeypatch.setattr(presets, "read_text", None)
    for group in ("model", *(f"model/{kind}" for kind in registry.kinds())):
        options(group)
        SOURCE.list(group, ObjectType.GROUP)


@pytest.mark.parametrize(
    "arguments, found",
    [
        ([], []),
        (["seed=1"], []),
        (["--config-dir", "mine"], ["mine/preset"]),
        (["--config-dir=mine"], ["mine/preset"]),
        (["-cd", "mine", "seed=1"], ["mine/preset"]),
        (["--config-dir"], []),
    ],
)
def test_folder_of_the_users_own_presets_is_read_off_the_command_line(
    arguments: list[str], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    included: list[str] = []
    monkeypatch.setattr(presets, "include", lambda folder: included.append(folder.as_posix()))
    include_config_dir(arguments)
    assert included == found
