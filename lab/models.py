"""A model by name, from a preset, run, checkpoint or file: as overrides of a run, and on the meta device."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.registry.command import quoted
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.named_model import composition_of

FILES = (".yaml", ".yml")
REMEDY = "Name a preset, a run's folder (logs/train/runs/…), a *.ckpt, or a *.yaml that holds a composition"


def load(name: str, overrides: Sequence[str] = ()) -> Decoder:
    """The decoder of a preset, a run's folder, a checkpoint or a composition's file, on the meta device.

    Args:
        name: of the preset, or the path
        overrides: of the composition, as blockwright train takes them

    Raises:
        ConfigError: there is no such model, or it cannot be built
    """
    return compose(composition(name, overrides), device="meta")


def changes_model(key: str) -> bool:
    """Whether an override with this key is of the model: ``model/attention``, ``+model.mtp``."""
    return re.split(r"[./]", key.lstrip("+~"))[0] == "model"


def composition(name: str, overrides: Sequence[str] = ()) -> Any:
    """The composition of such a model, as ``compose`` takes it; arguments and errors as in ``load``."""
    node = compose_config(chosen(name, overrides)).model
    try:
        return composition_of(OmegaConf.to_container(node, resolve=True, enum_to_str=True))
    except OmegaConfBaseException as error:
        rule = str(error).splitlines()[0]
        raise ConfigError(error.full_key or "model", "…", rule, "Write the value itself") from None
    except ConfigError as error:
        if error.path not in ("model.file", "init_from", "ckpt_path"):
            raise
        raise ConfigError("model", name, error.rule, REMEDY) from None


def chosen(name: str, overrides: Sequence[str] = ()) -> list[str]:
    """The overrides by which a run has this model: its weights too, where a run or a checkpoint is named."""
    path = Path(name)
    if path.suffix in FILES:
        return ["model=file", f"model.file={quoted(path)}", *map(added, overrides)]
    if "/" in name or path.suffix:
        return ["model=pretrained", f"init_from={quoted(path)}", *map(added, overrides)]
    return [f"model={name}", *overrides]


def added(override: str) -> str:
    """An override of a model that is named and not written: nothing of it is in the groups, so all is added."""
    return re.sub(r"^model([/.])", lambda found: ("+" if found[1] == "/" else "++") + found[0], override)
