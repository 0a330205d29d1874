"""Presets: whole models by name, each a composition in its own file, ``NAME.yaml``.

Built-in presets are in conf/preset/. A plug-in offers a package folder of YAML files through the entry-point group
``blockwright.presets``, and a user in the folder ``preset`` of their own configurations. Presets are data from any
source: they are subject to ``blockwright.registry.limits``, and name registered blocks only.

    inherits: llama2_7b        # another preset, which the rest of the file patches:
    n_layers: 40               # a value replaces
    attention: {n_heads: 40}   # a node without a name patches, a node with one replaces
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.registry import plugins, user_conf
from blockwright.registry.build import refuse_targets, to_plain
from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.layout import patched
from blockwright.registry.limits import read_text

ENTRY_POINTS = "blockwright.presets"
BUILTIN = Path(__file__).resolve().parent.parent / "conf" / "preset"
FORMAT = 2  # of saved compositions
RESERVED = frozenset({"base", "file", "pretrained"})  # options of ``model`` in conf/model/


@dataclass(frozen=True)
class Preset:
    """One preset.

    Args:
        name: what ``model=`` takes
        file: its YAML file
        owner: the distribution that provides it, or the user's folder
    """

    name: str
    file: Path
    owner: str

    @property
    def summary(self) -> str:
        """The comment at the top of its file."""
        first = read_text(self.file, "model").partition("\n")[0]
        return first.lstrip("# ").rstrip() if first.startswith("#") else ""


def names(kind: str | None = None) -> list[str]:
    """All presets, or those with a block of this kind, in alphabetical order."""
    return sorted(name for name in _known() if kind is None or _has(name, kind))


def exists(name: str) -> bool:
    """Whether there is a preset with this name: Hydra asks for each part of a configuration."""
    return bool(_named(name))


def _has(name: str, kind: str) -> bool:
    try:
        return _read(name, ()).get(kind) is not None
    except ConfigError:  # raised again where it is chosen
        return False


def find(name: str, path: str = "model") -> Preset:
    """The preset with this name.

    Args:
        name: of the preset
        path: where it is named, for the error

    Raises:
        ConfigError: there is none, or there are several
    """
    found = _named(name)
    if not found:
        raise ConfigError(path, name, "there is no such preset", did_you_mean(name, _known()))
    if len(found) > 1:
        owners = " and ".join(f"{preset.owner} ({preset.file})" for preset in found)
        raise ConfigError(path, name, f"several presets have this name, of {owners}", "Rename or remove one of them")
    return found[0]


def read(name: str) -> dict[str, Any]:
    """The composition of a preset, with ``inherits`` resolved.

    Returns:
        plain values, which the caller may change

    Raises:
        ConfigError: there is no such preset, its file cannot be read, or it inherits itself
    """
    return copy.deepcopy(_read(name, ()))


def inherited(model: Mapping[str, Any], heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """Resolve ``inherits`` of a composition: the preset that it names, patched by the rest.

    Args:
        model: plain values
        heirs: presets that inherit this composition, the direct one last

    Raises:
        ConfigError: it inherits itself, or a preset that does not exist
    """
    patch = {key: value for key, value in model.items() if key != "inherits"}
    if "inherits" not in model:
        return patch
    parent = model["inherits"]
    if not isinstance(parent, str):
        raise ConfigError("model.inherits", parent, "must be the name of a preset", "Write e.g. inherits: llama2_7b")
    return patched(_read(parent, heirs, "model.inherits"), patch)


def _read(name: str, heirs: tuple[str, ...], path: str = "model") -> dict[str, Any]:
    if name in heirs:
        chain = " → ".join((*heirs, name))
        raise ConfigError("model.inherits", name, f"the preset inherits itself ({chain})", "Write its values out")
    preset = find(name, path)
    try:
        return inherited(dict(_parsed(read_text(preset.file, "model"))), (*heirs, name))
    except ConfigError as error:
        where = f" (preset {name}, {preset.file})"
        rule = error.rule if where in error.rule else error.rule + where
        raise ConfigError(error.path, error.value, rule, error.remedy) from None


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> dict[str, Any]:
    """Parse a preset; cached, since Hydra asks for each part."""
    model = to_plain(text)
    if not isinstance(model, dict):
        raise ConfigError("model", model, "must be a mapping", "Write keys such as d_model and attention")
    refuse_targets(model, "model")
    if "defaults" in model:
        rule = "a preset is a composition and has no defaults list"
        raise ConfigError("model.defaults", model["defaults"], rule, "Write inherits: NAME, then what differs from it")
    refuse_other_format(model)
    return model


def refuse_other_format(model: Mapping[str, Any]) -> None:
    """Refuse a composition that another version has saved: what its words mean is not known."""
    written = model.get("format")
    if written not in (None, FORMAT) or isinstance(written, bool):
        rule = f"is a composition format unknown to this version (its own: {FORMAT})"
        raise ConfigError("model.format", written, rule, "Leave it out, or use the version that saved the composition")


def _known() -> set[str]:
    """The names of all presets."""
    return {file.stem for folder in _folders() for file in folder.glob("*.yaml")}


def _named(name: str) -> list[Preset]:
    """The presets with this name, of different owners.

    Folders are listed, and no path is made of a name that is not in them: it may be of an untrusted file.
    """
    file = f"{name}.yaml"
    return [Preset(name, folder / file, owner) for folder, owner in _folders().items() if file in os.listdir(folder)]


def _folders() -> dict[Path, str]:
    """Folder → owner, each once.

    Raises:
        ConfigError: as ``user_conf.folders``, or a folder has a preset with a reserved name
    """
    own = [folder for each in user_conf.folders() if (folder := each / "preset").is_dir()]
    found = {BUILTIN: "blockwright", **_of_plugins(), **dict.fromkeys(own, "you")}
    for file in (folder / f"{name}.yaml" for folder in found for name in RESERVED):
        if file.is_file():
            rule = f"model={file.stem} is blockwright's own, so no preset can have this name"
            raise ConfigError("model", str(file), rule, "Rename the file")
    return found


@functools.cache
def _of_plugins() -> dict[Path, str]:
    return plugins.folders(ENTRY_POINTS)
