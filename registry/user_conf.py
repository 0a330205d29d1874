"""The user's own folders of configurations: options beside those of this project, by the same groups.

A folder holds ``experiment/mine.yaml``, ``preset/mine.yaml``, ``ablation/mine.yaml`` and so on. For every command it is

* each that ``--config-dir DIR`` names, or the environment variable ``BLOCKWRIGHT_CONF``, separated as in PATH;
* without these, ``conf = "DIR"`` under ``[tool.blockwright]`` in the nearest pyproject.toml;
* without that, ``conf`` in the working folder.

An option means the same in every repository, so a file with the name of an option of this project is refused. Files
outside of groups, such as the config.yaml of another program, are not read.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from blockwright.registry.errors import ConfigError
from blockwright.registry.limits import read_text

VARIABLE = "BLOCKWRIGHT_CONF"
FLAGS = ("--config-dir", "-cd")
PROVIDER = "you"  # what Hydra calls these folders
OURS = Path(__file__).resolve().parent.parent / "conf"


def taken(arguments: Sequence[str]) -> list[str]:
    """The arguments without ``--config-dir DIR``, which is put into the variable, for processes that are started too.

    Raises:
        ConfigError: the flag has no folder after it, or one without options
    """
    rest, named, words = list[str](), _named() or [], iter(arguments)
    for word in words:
        flag, equals, folder = word.partition("=")
        if flag not in FLAGS:
            rest.append(word)
        elif not (folder := folder if equals else next(words, "")):
            raise ConfigError("--config-dir", folder, "names a folder", "Write --config-dir DIR")
        else:
            _existing("--config-dir", folder)
            named += [] if folder in named else [folder]
    if len(rest) < len(arguments):
        os.environ[VARIABLE] = os.pathsep.join(named)
    return rest


def flags() -> list[str]:
    """The flags by which another process in this working folder finds the same folders."""
    return [word for folder in _named() or [] for word in ("--config-dir", folder)]


def folders() -> list[Path]:
    """The folders, each once, without this project's own.

    Raises:
        ConfigError: a folder that is named does not exist; a file has the name of an option of this project
    """
    named = _named()
    source, found = (VARIABLE, named) if named is not None else _found(Path.cwd())
    known = dict.fromkeys(_existing(source, each) for each in found)
    known.pop(OURS, None)
    for folder in known:
        _refuse_taken_names(folder)
    return list(known)


def _named() -> list[str] | None:
    given = os.environ.get(VARIABLE)
    return None if given is None else [*filter(None, given.split(os.pathsep))]


def _found(here: Path) -> tuple[str, list[str]]:
    """What names a folder, and the folder, where nothing is said; none in a checkout of this project."""
    file = next((file for above in (here, *here.parents) if (file := above / "pyproject.toml").is_file()), None)
    declared = {} if file is None else _declared(file)
    where = f"{file}: tool.blockwright.conf"
    match declared:
        case {"project": {"name": "blockwright"}}:
            return where, []
        case {"tool": {"blockwright": {"conf": str(name)}}} if file:
            return where, [str(file.parent / name)]
        case {"tool": {"blockwright": {"conf": other}}}:
            raise ConfigError(where, other, "must be the name of a folder", 'Write conf = "conf"')
    return "conf", ["conf"] if _has_options(here / "conf") else []


@functools.cache
def _declared(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(file, str(file), ""))
    except (tomllib.TOMLDecodeError, ConfigError):  # of another tool's concern
        return {}


def _existing(source: str, name: str) -> Path:
    folder = Path(name).expanduser().resolve()
    remedy = "Name a folder of groups, such as experiment/ and preset/"
    if not folder.is_dir():
        raise ConfigError(source, name, "there is no such folder", remedy)
    if not _has_options(folder):
        near = next((each for each in (folder / "conf", folder.parent) if _has_options(each)), None)
        raise ConfigError(source, name, "holds no GROUP/NAME.yaml", f"Did you mean {near}?" if near else remedy)
    return folder


def _has_options(folder: Path) -> bool:
    """Whether there is a group below it: one of this project, or a folder of YAML that is no such folder itself."""
    groups = {each.name for each in OURS.iterdir() if each.is_dir()}
    below = [each for each in folder.glob("*/") if each.is_dir()]
    return any(each.name in groups or (each.name != "conf" and any(each.glob("*.yaml"))) for each in below)


@functools.cache  # a composition asks for each of its parts
def _refuse_taken_names(folder: Path) -> None:
    for ours in OURS.glob("*/**/*.yaml"):
        file = folder / ours.relative_to(OURS)
        if ours.parent.name != "preset" and file.is_file():  # of two presets, the one that is asked for is refused
            rule = "has the name of an option of blockwright, which is taken in its place"
            group = ours.relative_to(OURS).parent.as_posix()
            raise ConfigError(group, str(file), rule, "Rename it; or name a folder of yours: --config-dir DIR")
