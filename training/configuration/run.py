"""A run as a value: all its settings, parsed once (training/entry/parse.py) and never changed."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from blockwright import registry
from blockwright.registry import ConfigError, did_you_mean
from blockwright.registry.ranges import Seed
from blockwright.registry.reading import Remedy, checked
from blockwright.training.configuration.placeholders import hidden
from blockwright.training.jobs import SWEEP

Changed = Literal["show", "allow"]
Node = Mapping[str, Any]  # a group, whose schema is the class that is built from it; read-only
OWN = ("compile", "dry_run", "world")  # keys of ``trainer`` that this project defines; Lightning's Trainer lacks them
GROUPS = ("callbacks", "logger")  # of nodes by name; arguments of Lightning's Trainer, which gets what they build
FOLDER = "checkpoints"  # in the folder of a run
FOLDERS = {"log_dir": str, "output_dir": str}  # of ``paths``: of all runs, and of this one; others are interpolated


class Resume(TypedDict):
    """What happens to settings that differ from the checkpoint's."""

    changed: Changed


class Extras(TypedDict):
    """What a run shows."""

    print_config: bool
    ignore_warnings: bool
    enforce_tags: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Run(Mapping[str, Any]):
    """Every setting of a run; conf/config.yaml says what each is for.

    It is also a read-only mapping of its settings by name, for what treats all of them alike: the record of a
    checkpoint, the files of the run, the parts that take a setting as context.

    Args:
        model: the composition, complete; null parts and defaults are written out
        starts: name → settings of what changes or adds to the weights of ``init_from``; each is a setting at the root
        ckpt_path: the checkpoint to resume from; None for a new run
        secrets: value from the environment → the interpolation that reads it; no setting
        is_patched: the model is the composition of the weights that it starts from, patched; no setting
    """

    task_name: Annotated[str, Remedy("Write the name of the runs' folder: task_name=mine")]
    tags: Annotated[list[str | int | float] | None, Remedy("Write tags=[mine]")]
    seed: Seed
    ckpt_path: Any  # as written it may be ``last``: resolved in entry/parse.py
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
    data: Node
    task: Node
    optimizer: Node
    scheduler: Node
    parametrisation: Annotated[Node | str, Remedy("Write parametrisation=standard, or another name of one")]
    trainer: Node
    callbacks: Mapping[str, Node | None]  # a null one is switched off
    logger: Mapping[str, Node | None]
    paths: Node
    extras: Extras
    starts: Mapping[str, Node | None]
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_patched: bool = False

    @classmethod
    def of(cls, plain: Mapping[str, Any], secrets: Mapping[str, str]) -> Run:
        """Check the settings at the root of a resolved configuration.

        Raises:
            ConfigError: an unknown, missing or invalid setting
        """
        starts = dict.fromkeys(_starts())
        settings = {**OLDER, **starts, **plain}
        if isinstance(settings.get("extras"), Mapping):
            settings["extras"] = {**EXTRAS, **settings["extras"]}
        settings |= {group: {} for group in GROUPS if group in settings and settings[group] is None}
        _check_mapping(settings, {**HINTS, **dict.fromkeys(starts, Node | None)})
        folders = {name: path for name, path in settings["paths"].items() if name in FOLDERS}
        _check_mapping(folders, FOLDERS, "paths.")
        run = cls.assemble(settings, secrets=secrets)
        if run.extras["enforce_tags"] and not run.tags:
            raise ConfigError("tags", run.tags, "extras.enforce_tags requires at least one", "Write tags=[mine]")
        if not run.task_name.strip("./ ") or ".." in run.task_name.split("/") or run.task_name.startswith(("/", "~")):
            rule = "names the runs' folder, inside paths.log_dir"
            raise ConfigError("task_name", run.task_name, rule, "Write a word: task_name=mine")
        return run

    @classmethod
    def assemble(cls, settings: Mapping[str, Any], **others: Any) -> Run:
        """A run of settings by name, unchecked; those that are missing are null.

        Args:
            settings: all of them, registered ones among them
            others: fields that are no settings
        """
        named: dict[str, Any] = {name: settings.get(name) for name in HINTS}
        return cls(**named, starts={name: settings.get(name) for name in _starts()}, **others)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name) if name in HINTS else self.starts[name]

    def __iter__(self) -> Iterator[str]:
        yield from HINTS
        yield from self.starts

    def __len__(self) -> int:
        return len(HINTS) + len(self.starts)

    @property
    def shown(self) -> Run:
        """The run with every value from the environment replaced by its interpolation, as files hold it."""
        return self.assemble(hidden(dict(self), self.secrets), is_patched=self.is_patched)

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return Path(self.paths["output_dir"])

    @property
    def keeper(self) -> Node:
        """The callback that keeps checkpoints; empty for none."""
        return self.callbacks.get("checkpoint") or {}

    @property
    def checkpoints(self) -> Path:
        """The folder that its checkpoints are written to."""
        return Path(self.keeper.get("dirpath") or self.folder / FOLDER)

    @property
    def in_sweep(self) -> bool:
        """True for a job of a sweep."""
        return (self.folder.resolve().parent / SWEEP).is_file()

    def owns(self, checkpoint: str | Path) -> bool:
        """True for a checkpoint in the run's own folder of checkpoints."""
        return Path(checkpoint).resolve().parent == self.checkpoints.resolve()


NO_SETTINGS = ("starts", "secrets", "is_patched")
HINTS = {k: v for k, v in typing.get_type_hints(Run, include_extras=True).items() if k not in NO_SETTINGS}
STANDARD = {"name": "standard"}  # the parametrisation of configurations without one
OLDER: dict[str, Any] = {  # settings that older configurations lack
    "resume": {"changed": "show"},
    "direction": None,
    "parametrisation": STANDARD,
}
EXTRAS = {"print_config": False, "ignore_warnings": False, "enforce_tags": False}  # for a file with some of them


def _starts() -> list[str]:
    return [name for name in registry.settings() if name not in HINTS]


def _check_mapping(settings: Mapping[str, Any], hints: Mapping[str, Any], within: str = "") -> None:
    """Refuse unknown, missing and invalid settings, those of a ``TypedDict`` within included."""
    for key in settings:
        if key not in hints:
            raise ConfigError(within + key, settings[key], "there is no such setting", did_you_mean(key, hints))
    for key, hint in hints.items():
        path = within + key
        if key not in settings:
            remedy = f"Add it: +{path}=…, or leave out what removes it (e.g. ~{path})"
            raise ConfigError(path, None, "every run has this setting", remedy)
        if typing.is_typeddict(hint) and isinstance(settings[key], Mapping):
            _check_mapping(settings[key], typing.get_type_hints(hint, include_extras=True), f"{path}.")
        else:
            checked(settings[key], dict if typing.is_typeddict(hint) else hint, path)
