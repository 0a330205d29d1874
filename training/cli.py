"""``python train.py fit|validate|test|predict``: Lightning CLI on the same configuration that Hydra composes.

``to_cli`` maps a composed configuration onto the CLI's names; nothing is configured twice. Values that live inside
the composition are changed through ``--compose`` (Hydra overrides): Lightning CLI replaces a nested dictionary as a
whole when one key of it is given. Left out: subcommands of the tuner.
"""

from __future__ import annotations

import os
import re
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from jsonargparse import ActionConfigFile
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from blocks.checkpoint import check_fits, read_checkpoint
from blocks.shape import read
from interop.source import check_init
from registry import ConfigError
from training.callbacks.recording import Recording
from training.checkpoints.optimizer import check_optimizer
from training.checkpoints.record import from_cli, past_of, record
from training.checkpoints.resume import CHANGED, check_changes
from training.composition import compose_config
from training.preflight import OWN, TASK, preflight
from training.run import conclude, leave_processes, quieten
from training.secrets import hidden, read_from_environment

SUBCOMMANDS = ("fit", "validate", "test", "predict")


def to_cli(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A checked configuration → a Lightning CLI configuration: ``_target_`` becomes class_path and init_args."""
    trainer = {k: _class(v) for k, v in plain["trainer"].items() if k not in ("_target_", *OWN)}
    trainer["callbacks"] = [_class(v) for v in (plain["callbacks"] or {}).values() if v]
    trainer["logger"] = [_class(v) for v in (plain["logger"] or {}).values() if v] or False
    task, data = _class(plain["task"]), _class(plain["data"])
    settings = {"seed_everything": plain["seed"], "ckpt_path": plain["ckpt_path"], "weights_only": True}
    settings["resume"] = {"changed": plain["resume"]["changed"]}
    return {**settings, "trainer": trainer, "model": task, "data": data}


def _class(node: Any) -> Any:
    if isinstance(node, list):
        return [_class(v) for v in node]
    if not isinstance(node, Mapping):
        return node
    inner = {k: _class(v) for k, v in node.items() if k not in ("_target_", "_convert_", "_recursive_")}
    return {"class_path": node["_target_"], "init_args": inner} if "_target_" in node else inner


def _named_checkpoint(arguments: list[str]) -> str | None:
    """The value of ``--ckpt_path``, or None."""
    for i, argument in enumerate(arguments):
        if argument.startswith("--ckpt_path="):
            return argument.partition("=")[2]
        if argument == "--ckpt_path":
            return arguments[i + 1] if i + 1 < len(arguments) else None
    return None


class ComposeAction(Action):
    """``--compose model=x model/attention=gqa …``: a Hydra composition used as the configuration."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_%f")
        cfg = compose_config(values, output_dir=f"${{paths.log_dir}}/${{task_name}}/cli/{stamp}")
        if (checkpoint := _named_checkpoint(sys.argv)) is not None:
            cfg.ckpt_path = checkpoint  # which the checks of what is resumed and overwritten have to know
        plain = preflight(cfg)
        _taken.update(read_from_environment(cfg))
        text = yaml.safe_dump(to_cli(plain), sort_keys=False)
        ActionConfigFile.apply_config(parser, namespace, "config", text)
        namespace.pop(self.dest, None)


_taken: dict[str, str] = {}  # what the configuration in use has from the environment


class Saved(SaveConfigCallback):
    """Lightning's copy of the configuration in the run's folder, without what came from the environment."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        file = Path(trainer.log_dir or ".") / self.config_filename
        if trainer.is_global_zero and _taken and file.is_file():
            file.write_text(hidden(file.read_text(), _taken))


def _fetch(settings: Any) -> None:
    """Put values of the environment where ``lightning_cli.yaml`` says ``${oc.env:NAME}``."""
    for key, value in list(settings.items()):
        named = re.fullmatch(r"\$\{oc\.env:(\w+)\}", value) if isinstance(value, str) else None
        if named and named[1] in os.environ:
            settings[key] = os.environ[named[1]]
            _taken[os.environ[named[1]]] = value


class FrontDoor(LightningCLI):
    """The CLI of this project: composed by default, and a checkpoint does not overrule the command line."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        parser.add_argument(
            "--compose",
            action=ComposeAction,
            nargs="*",
            metavar="OVERRIDE",
            help="compose conf/ with these Hydra overrides, and use the result as the configuration",
        )
        parser.add_argument(
            "--resume.changed",
            type=Literal[CHANGED],
            default=CHANGED[0],
            help="settings that differ from the checkpoint's; allow: also those that alter what its weights mean",
        )
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyper-parameters win over the command line; here the command line is right."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        _fetch(settings)
        given = settings.model.get("init_args", {})
        if settings.get("ckpt_path"):
            checkpoint = read_checkpoint(settings.ckpt_path, shapes_only=True)
            if given.get("init_from"):
                given["init_from"] = None  # a run that goes on has its own weights
            if "model" in given and settings.model.class_path == TASK:
                check_fits(checkpoint, read(given["model"]), settings.ckpt_path)
        elif given.get("init_from") and settings.model.class_path == TASK:
            check_init(Path(given["init_from"]), read(given["model"]))

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            if refusal := _refusal_within(error):
                raise refusal from None
            raise

    def before_fit(self) -> None:
        """Compare the run with the checkpoint that it resumes from, and record its configuration in its own."""
        settings = self.config[self.subcommand]
        plain = from_cli(settings.as_dict())
        ours = record(plain)
        if settings.get("ckpt_path") and settings.model.class_path == TASK:
            path, checkpoint = str(settings.ckpt_path), read_checkpoint(settings.ckpt_path, shapes_only=True)
            check_optimizer(checkpoint, self.model.recipe, self.model.model_config, path)
            check_changes(
                path, past_of(checkpoint), ours, {**plain, "train": True, "resume": settings.resume.as_dict()}
            )
        self.trainer.callbacks.append(Recording(ours))  # type: ignore[attr-defined]

    def after_fit(self) -> None:
        conclude(self.trainer, self.model, self.datamodule, test=False)


def _refusal_within(error: BaseException) -> ConfigError | None:
    """The constructor's own refusal, which jsonargparse buries in an account of the types it tried."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, ConfigError):
        inner = inner.__cause__ or inner.__context__
    return inner


def main(arguments: list[str]) -> None:
    """Run a subcommand; without ``--config`` or ``--compose`` the default composition is used.

    Raises:
        ConfigError: the composition is refused
        Interrupted: stopped by a signal, after saving
    """
    given = {a.split("=")[0] for a in arguments}
    if not given & {"-c", "--config", "--compose", "-h", "--help"}:
        arguments = [arguments[0], "--compose", *arguments[1:]]
    quieten(ignore=False)
    sys.argv = [sys.argv[0], *arguments]
    _taken.clear()
    try:
        FrontDoor(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            save_config_callback=Saved,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "yaml"},
        )
    finally:
        leave_processes()


def export(plain: Mapping[str, Any], directory: Path) -> Path:
    """Write ``lightning_cli.yaml``, from which ``fit --config`` repeats the run without Hydra."""
    path = directory / "lightning_cli.yaml"
    path.write_text(yaml.safe_dump(to_cli(plain), sort_keys=False))
    return path
