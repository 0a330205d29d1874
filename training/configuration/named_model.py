"""A composition that a configuration names instead of writing it: ``model=file``, ``model=pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.source import read_composition
from blockwright.registry import ConfigError, presets, refuse_targets, to_plain
from blockwright.registry.layout import patched
from blockwright.registry.limits import read_text


def composition_of(model: Any) -> Any:
    """The model node, or the composition that it names, patched by its other keys.

    It names a model file or an imported checkpoint. Both may be untrusted, and are read as data.
    """
    if isinstance(model, dict) and "file" in model:
        patch = {k: v for k, v in model.items() if k != "file"}
        found = to_plain(read_text(Path(str(model["file"])), "model.file"))
        if not isinstance(found, dict):
            raise ConfigError("model.file", model["file"], "must hold a mapping", "Name a YAML file of a model")
        refuse_targets(found, "model")
        return patched(presets.inherited(found), patch)
    if not is_patched(model):
        return model
    folder, patch = model["pretrained"], {k: v for k, v in model.items() if k != "pretrained"}
    if folder is None:
        rule = "takes the composition of a run or an imported checkpoint, but none is named"
        remedy = "Name a run's folder, or the OUT of blockwright import: init_from=OUT"
        raise ConfigError("init_from", None, rule, remedy)
    return patched(read_composition(Path(folder)), patch)


def is_patched(model: Any) -> bool:
    """True for ``model=pretrained``, whose other keys patch the composition of the weights."""
    return isinstance(model, dict) and "pretrained" in model
