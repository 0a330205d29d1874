"""conf/: its location, its groups and their options, and composition by Hydra outside ``@hydra.main``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from blockwright.registry import catalogue, presets

CONF = Path(__file__).resolve().parents[2] / "conf"


def composed(overrides: Sequence[str]) -> DictConfig:
    """Compose conf/ with overrides; raises Hydra's exceptions."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        return compose("config", overrides=list(overrides))


def options(group: str) -> list[str]:
    """The options of a group that have files, presets included; without registered blocks."""
    files = [p.stem for p in (CONF / group).glob("*.yaml")] if group else []
    return sorted([*files, *presets.names()] if group == "model" else files)


def groups() -> list[str]:
    """All groups, blocks included."""
    files = {p.parent.relative_to(CONF).as_posix() for p in CONF.rglob("*.yaml")} - {"."}
    return sorted({*files, *of_blocks()})


def of_blocks() -> list[str]:
    """The groups whose options are registered blocks."""
    return catalogue.groups()
