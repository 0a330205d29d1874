"""Load a model by name, from a preset, run, checkpoint or file, onto the meta device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import registry
from blocks.checkpoint.read import read_checkpoint
from blocks.compose import compose
from blocks.decoder import Decoder
from registry import ConfigError
from training.configuration.composing import compose_config


def load(name: str, overrides: Sequence[str] = ()) -> Decoder:
    """The decoder of a preset, a run's folder, a checkpoint or a composition's file, on the meta device.

    Raises:
        ConfigError: there is no such model, or it cannot be built
    """
    path = Path(name)
    if "/" not in name and path.suffix not in (".ckpt", ".yaml", ".yml"):
        return compose(compose_config([f"model={name}", *overrides]).model, device="meta")
    if path.suffix in (".yaml", ".yml"):
        return compose(_changed(_written(path), overrides), device="meta")
    checkpoint = read_checkpoint(_checkpoint_of(path) if path.is_dir() else path)
    return compose(_changed(checkpoint["hyper_parameters"]["model"], overrides), device="meta")


def _written(path: Path) -> Any:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "Name a file that holds a composition"
        raise ConfigError("model", str(path), f"cannot be read ({type(error).__name__})", remedy) from None
    written = registry.to_plain(text)
    return written["model"] if isinstance(written, dict) and isinstance(written.get("model"), dict) else written


def _checkpoint_of(run: Path) -> Path:
    last = run / "checkpoints" / "last.ckpt"
    found = sorted((run / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
    if not found:
        remedy = "Name a run's folder (logs/train/runs/…), a *.ckpt or a *.yaml"
        raise ConfigError("model", str(run), "holds no checkpoints/*.ckpt", remedy)
    return last if last.exists() else found[-1]


def _changed(model: Any, overrides: Sequence[str]) -> Any:
    """A composition from a file, with values set on top of it."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not key.startswith("model."):
            rule = "only values can be set in a model that is a file: it has no groups to choose from"
            raise ConfigError(key, value, rule, "Write model.KEY=VALUE, or start from a preset")
    if not overrides:
        return model
    try:
        changes = OmegaConf.from_dotlist([override.lstrip("+").removeprefix("model.") for override in overrides])
        return OmegaConf.merge(OmegaConf.create(model), changes)
    except (OmegaConfBaseException, ValueError) as error:
        rule = str(error).splitlines()[0]
        raise ConfigError("command line", " ".join(overrides), rule, "Write model.KEY=VALUE") from None
