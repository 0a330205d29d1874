"""The folders of configurations: this project's conf/, the user's and other packages'; groups, options, composition.

A package offers a folder through the entry-point group ``blockwright.conf``: ``NAME = "package.folder"``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from blockwright.registry import catalogue, plugins, presets, user_conf

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    """Compose the configuration with overrides, and Hydra's own if it is wanted; raises Hydra's exceptions."""
    from hydra import compose, initialize_config_dir  # completion does without
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=list(overrides), return_hydra_config=with_hydra)


def folders() -> list[Path]:
    """All folders, in the order in which Hydra searches them."""
    return [CONF, *user_conf.folders(), *plugins.folders(plugins.CONF)]


def files(group: str) -> list[Path]:
    """The files of a group, in alphabetical order of the options that they are."""
    return sorted(
        (file for folder in folders() for file in (folder / group).glob("*.yaml")), key=lambda file: file.stem
    )


def options(group: str) -> list[str]:
    """The options of a group that have files, presets included; without registered blocks."""
    named = [file.stem for file in files(group)] if group else []
    return sorted([*named, *presets.names()] if group == "model" else named)


def groups() -> list[str]:
    """All groups, blocks included."""
    return sorted({*of_files(), *of_blocks()})


def of_files() -> list[str]:
    """The groups whose options have files."""
    grouped = {file.parent.relative_to(folder).as_posix() for folder in folders() for file in folder.rglob("*.yaml")}
    return sorted(grouped - {"."})


def of_blocks() -> list[str]:
    """The groups whose options are registered blocks."""
    return catalogue.groups()


def settings() -> list[str]:
    """The keys of the configuration that belong to no group."""
    return sorted(yaml.safe_load((CONF / "config.yaml").read_text()).keys() - {"defaults"})


# --- the two command lines: which one this is, and what of Hydra's is passed to another process ---


CONFIG_FLAGS = ("--config-name", "-cn", "--config-path", "-cp")
SUBCOMMANDS = ("fit", "validate", "test", "predict")  # of Lightning CLI, as the first word


def is_lightning_cli(arguments: list[str]) -> bool:
    """Whether settings are written ``--KEY VALUE``, and not ``KEY=VALUE``."""
    return bool(arguments) and arguments[0] in SUBCOMMANDS


def config_flags(arguments: list[str]) -> list[str]:
    """Options that locate the configuration: Hydra's, and the user's folders if they are named."""
    found = user_conf.flags()
    for i, argument in enumerate(arguments):
        if argument in CONFIG_FLAGS:
            found += arguments[i : i + 2]
        elif argument.startswith(tuple(f"{flag}=" for flag in CONFIG_FLAGS)):
            found.append(argument)
    return found


def kept(overrides: list[str]) -> list[str]:
    """Overrides of Hydra's own configuration that a job needs when it runs alone."""
    return [o for o in overrides if o.lstrip("+").startswith("hydra.searchpath")]
