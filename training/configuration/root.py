"""The settings at the root of a configuration, with their types and ranges: what every run has."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

from annotated_types import Ge

from blockwright import registry
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.ranges import Seed, parts
from blockwright.registry.schema import conforms, fault

Changed = Literal["show", "allow"]
Part = dict[str, Any] | None  # of a group, null if it is left out; checked where it is built


@dataclass(frozen=True)
class Remedy:
    """What to write instead of a value that is refused, where the rule does not say it."""

    text: str


class Resume(TypedDict):
    """What happens to settings that differ from the checkpoint's."""

    changed: Changed


class Extras(TypedDict):
    """What a run shows."""

    print_config: bool
    ignore_warnings: bool
    enforce_tags: bool


class Paths(TypedDict):
    """The folders that the program itself reads; further ones are for a configuration's own interpolations."""

    log_dir: str
    output_dir: str


class Root(TypedDict):
    """Every setting of a run but its registered ones; conf/config.yaml says what each is for."""

    task_name: Annotated[str, Remedy("Write the name of the runs' folder: task_name=mine")]
    tags: Annotated[list[str | int | float] | None, Remedy("Write tags=[mine]")]
    seed: Seed
    ckpt_path: Any  # looked for by checkpoints.resume
    auto_resume: bool
    resume: Resume
    init_from: Annotated[str | None, Remedy("Name a run's folder, or the OUT of blockwright import: init_from=OUT")]
    train: bool
    test: bool
    optimized_metric: Annotated[str, Remedy("Name the figure by which runs are compared: optimized_metric=val/loss")]
    direction: Annotated[
        Literal["minimize", "maximize"] | None,
        Remedy("Leave it out: it follows from the figure, if a task or a callback declares that"),
    ]
    model: Any
    data: dict[str, Any]
    task: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    trainer: dict[str, Any]
    callbacks: Part
    logger: Part
    paths: Paths
    extras: Extras


OLDER: dict[str, Any] = {  # not in older configurations
    "resume": {"changed": "show"},
    "direction": None,
}
EXTRAS = {"print_config": True, "ignore_warnings": False, "enforce_tags": False}  # for a file with some of them


def check(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Check the settings at the root; those that older versions did not have get their defaults.

    Args:
        plain: a resolved configuration, as plain types

    Raises:
        ConfigError: an unknown, missing or invalid setting
    """
    hints = typing.get_type_hints(Root, include_extras=True)
    registered = {name: Part for name in registry.settings() if name not in hints}
    settings = {**OLDER, **dict.fromkeys(registered), **plain}
    if isinstance(settings.get("extras"), Mapping):
        settings["extras"] = {**EXTRAS, **settings["extras"]}
    _check(settings, {**hints, **registered}, "")
    for group in ("callbacks", "logger"):
        for name, node in (settings[group] or {}).items():
            check_value(f"{group}.{name}", node, Part)
    if settings["extras"]["enforce_tags"] and not settings["tags"]:
        raise ConfigError("tags", settings["tags"], "extras.enforce_tags requires at least one", "Write tags=[mine]")
    name = settings["task_name"]
    if not name.strip("./ ") or ".." in name.split("/") or name.startswith(("/", "~")):
        rule = "names the runs' folder, inside paths.log_dir"
        raise ConfigError("task_name", name, rule, "Write a word: task_name=mine")
    return settings


def _check(settings: Mapping[str, Any], hints: Mapping[str, Any], within: str, open_ended: bool = False) -> None:
    for key, value in settings.items():
        if key not in hints and not open_ended:
            raise ConfigError(within + key, value, "there is no such setting", did_you_mean(key, hints))
    for key, hint in hints.items():
        path = within + key
        if key not in settings:
            raise ConfigError(
                path,
                None,
                "every run has this setting",
                f"Add it: +{path}=…, or leave out what removes it (e.g. ~{path})",
            )
        if typing.is_typeddict(hint) and isinstance(settings[key], Mapping):
            inner = typing.get_type_hints(hint, include_extras=True)
            _check(settings[key], inner, f"{path}.", open_ended=hint is Paths)
        else:
            check_value(path, settings[key], dict if typing.is_typeddict(hint) else hint)


def check_setting(key: str, value: Any) -> None:
    """Refuse the value of one setting at the root, as ``check`` does; raises alike."""
    check_value(key, value, typing.get_type_hints(Root, include_extras=True)[key])


def check_value(path: str, value: Any, hint: Any) -> None:
    """Refuse a value that does not match an annotation.

    Raises:
        ConfigError: with the remedy of the annotation, if it has one
    """
    if not conforms(value, hint):
        raise ConfigError(path, value, fault(value, hint), _remedy(path, hint))


def _remedy(path: str, hint: Any) -> str:
    plain, more = parts(hint)
    if known := next((each.text for each in more if isinstance(each, Remedy)), None):
        return known
    if bounds := [bound.ge for bound in more if isinstance(bound, Ge)]:
        return f"Write {path}={bounds[0]}"
    choices: tuple[str, ...] = ("true", "false") if plain is bool else ()
    if typing.get_origin(plain) is Literal:
        choices = typing.get_args(plain)
    return f"Write {' or '.join(f'{path}={choice}' for choice in choices)}" if choices else f"Leave out {path}=…"
