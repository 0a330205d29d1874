"""``blockwright train fit|validate|test|predict``: Lightning CLI on the same configuration that Hydra composes.

``to_cli`` maps a composed configuration onto the CLI's names; nothing is configured twice. Values that live inside
the composition are changed through ``--compose`` (Hydra overrides): Lightning CLI replaces a nested dictionary as a
whole when one key of it is given. What is composed comes first, wherever ``--compose`` is written; files and options
change it. Every command writes to its own folder (see placeholders.py), so a run that is repeated, resumed or measured
is unchanged. Not supported: subcommands of the tuner.
"""

from __future__ import annotations

import re
import sys
from argparse import Action, ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from inspect import Parameter, Signature
from operator import or_
from pathlib import Path
from typing import Any, get_args

import lightning as L
import yaml
from jsonargparse import ActionConfigFile, get_loader, set_loader
from jsonargparse.typing import register_type
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from blockwright import registry
from blockwright.blocks.checkpoint.read import check_fits, read_checkpoint
from blockwright.blocks.compose import read
from blockwright.registry import ConfigError
from blockwright.registry.folder import write_text
from blockwright.registry.ranges import Seed
from blockwright.registry.reading import checked
from blockwright.renamed import with_moved
from blockwright.training.callbacks.interruption import Recording
from blockwright.training.callbacks.samples import Predictions
from blockwright.training.checkpoints.record import from_cli, record
from blockwright.training.configuration import parts, placeholders
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.instantiate import check_target, to_class_paths, to_targets
from blockwright.training.configuration.run import OWN, STANDARD, Changed, Run
from blockwright.training.entry.execute import conclude, leave_processes, measure, no_bar, quieten, restoring
from blockwright.training.entry.preflight import prepare
from blockwright.training.entry.start import check_resumed, refuse_random_weights
from blockwright.training.starts import outline

FILE = "lightning_cli.yaml"  # in the folder of a run: its configuration, for ``--config``
MODE = "settings"  # of the parser: YAML in which a class may have its path of an older version
set_loader(MODE, lambda text: with_moved(get_loader("yaml")(text)), exceptions=(yaml.YAMLError,))


def to_cli(run: Run) -> dict[str, Any]:
    """A run → a configuration of Lightning CLI: ``_target_`` becomes class_path and init_args.

    Its ``model`` is what ``make_task`` takes, its ``data`` what ``make_data`` takes.

    Paths in the run's folder begin with ``${run_dir}``, which each use of the configuration chooses.
    """
    classes = to_class_paths(run)
    trainer = {k: v for k, v in classes["trainer"]["init_args"].items() if k not in OWN}
    trainer["callbacks"] = [node for node in classes["callbacks"].values() if node]
    trainer["logger"] = [node for node in classes["logger"].values() if node] or False
    task = {key: classes[key] for key in _settings_of_task()}
    settings = {"seed_everything": run.seed, "ckpt_path": run.ckpt_path, "weights_only": True}
    settings["resume"] = {"changed": run.resume["changed"]}
    parts = {**settings, "trainer": trainer, "model": task, "data": {"data": classes["data"]}}
    new = placeholders.template(run.paths["log_dir"], run.task_name)
    return {"run_dir": new, **placeholders.portable(parts, run.paths["output_dir"])}


def make_task(**settings: Any) -> L.LightningModule:
    """Build the task of a run.

    Args:
        task: its name and its settings
        model: composition
        optimizer: class and arguments
        scheduler: class and arguments
        parametrisation: its name and its settings
        seed: of the initial weights and all random draws of training
        init_from: a run's folder, a checkpoint or an imported folder to take the initial weights from
    """
    return parts.build("task", to_targets(settings))


def _settings_of_task() -> dict[str, tuple[Any, Any]]:
    """Name → type and default of what ``make_task`` takes; every registered start is one.

    Without types within, jsonargparse leaves the values of a dictionary as they are.
    """
    needed = dict.fromkeys(("task", "model", "optimizer", "scheduler"), (dict, Parameter.empty))
    starts = dict.fromkeys(registry.settings(), (dict | None, None))
    more = {"parametrisation": (dict, STANDARD), "seed": (Seed, 0)}
    return {**needed, **more, **starts, "init_from": (str | None, None)}


def make_data(data: dict, model: dict) -> L.LightningDataModule:
    """Build the data module of a run.

    Args:
        data: its name and its settings
        model: composition of the run's model
    """
    return parts.build("data", to_targets({"data": data, "model": model}))


def _value_of(option: str, arguments: list[str]) -> str | None:
    """What an option such as ``--ckpt_path`` is given, or None."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{option}="):
            return argument.partition("=")[2]
        if argument == option:
            return arguments[i + 1] if i + 1 < len(arguments) else None
    return None


class ComposeAction(Action):
    """``--compose model=x model/attention=gqa …``: a Hydra composition used as the configuration."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        cfg = compose_config(values, output_dir=placeholders.ANY)
        if (checkpoint := _value_of("--ckpt_path", sys.argv)) is not None:
            cfg.ckpt_path = checkpoint  # needed by the checks of resuming and overwriting
        text = yaml.safe_dump(to_cli(prepare(cfg).shown), sort_keys=False)
        ActionConfigFile.apply_config(parser, namespace, "config", text)
        namespace.pop(self.dest, None)


class Saved(SaveConfigCallback):
    """Saves the configuration in the run's folder, with placeholders for the folder and secrets."""

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / FILE).exists():  # else it is this run's own, resumed here
            write_text(folder / FILE, self.parser.dump(self.config, skip_none=False))


class ComposedCLI(LightningCLI):
    """Lightning CLI with a composed default configuration, in which a checkpoint does not override the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.model", "data.model")

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
            type=Changed,
            default="show",
            help="settings that differ from the checkpoint's; allow: also those that alter what its weights mean",
        )
        parser.add_argument(
            "--run_dir",
            type=str,
            default=placeholders.template("logs", "train"),
            help="folder of this run: a new one, or that of the run that --ckpt_path resumes; ${now} is the time",
        )
        return parser

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and seed is not None:
            checked(seed, Seed, "seed_everything")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Do nothing: Lightning would let a checkpoint's hyper-parameters override the command line."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        given = settings.model
        if self.subcommand != "fit":
            refuse_random_weights(settings.get("ckpt_path"), given.init_from)
        model = read(given.model)
        for part in ("optimizer", "scheduler"):
            check_target(to_targets(given[part]), part)
        starts = parts.starts({**to_targets(given.as_dict()), "model": model})
        if settings.get("ckpt_path"):
            checkpoint = read_checkpoint(settings.ckpt_path, shapes_only=True)
            check_fits(checkpoint, outline(model, starts, given.task.get("frozen")), settings.ckpt_path)
        else:
            for start in starts:
                start.check(model)

    def instantiate_classes(self) -> None:
        """Build everything with folder and secrets filled in; the saved configuration keeps the placeholders."""
        self._written = self.config
        settings = self.config[self.subcommand]
        self.config = self.config.clone()
        run_dir = placeholders.choose(settings.run_dir, settings.get("ckpt_path") if self.subcommand == "fit" else None)
        self.config[self.subcommand] = placeholders.filled(settings.clone(), run_dir)
        settings.run_dir = placeholders.beside(settings.run_dir)
        try:
            super().instantiate_classes()
        except ValueError as error:
            if refusal := _refusal_within(error):
                raise refusal from None
            raise
        placeholders.refuse_to_overwrite(self.trainer, settings.get("ckpt_path"))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        self.config = self._written  # saved by the trainer's callback
        given = self._get(self.config_init, "trainer")
        quiet = no_bar(given.get("callbacks") or []) if given.get("enable_progress_bar") is None else {}
        return super().instantiate_trainer(**quiet, **kwargs)

    def before_fit(self) -> None:
        """Compare the run with the checkpoint to resume from, and record its configuration in its own checkpoints."""
        run = from_cli(self.config[self.subcommand].as_dict())
        if run.ckpt_path:
            check_resumed(run)
        self.trainer.callbacks.append(Recording(record(run)))  # type: ignore[attr-defined]

    def fit(self, model: Any, datamodule: Any = None, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Train, from a checkpoint if one is named."""
        with restoring(self.trainer, ckpt_path):
            self.trainer.fit(model, datamodule=datamodule, weights_only=True)

    def after_fit(self) -> None:
        conclude(self.trainer, self.model, self.datamodule, test=False)

    def validate(self, model: Any, datamodule: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Measure a checkpoint on all of the validation text."""
        measure(self.trainer, model, datamodule, ("validate",), ckpt_path)

    def test(self, model: Any, datamodule: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Measure a checkpoint on all of the test text."""
        measure(self.trainer, model, datamodule, ("test",), ckpt_path)

    def predict(self, model: Any, datamodule: Any, ckpt_path: str | None = None, **kwargs: Any) -> None:
        """Write the likeliest next token after each one of the test text."""
        datamodule.eval_windows = None
        self.trainer.callbacks.append(Predictions(self.trainer.default_root_dir))  # type: ignore[attr-defined]
        with restoring(self.trainer, ckpt_path):
            self.trainer.predict(model, datamodule, return_predictions=False, weights_only=True)


def _refusal_within(error: BaseException) -> ConfigError | None:
    """The constructor's own error, which jsonargparse hides in a list of the types it tried."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, ConfigError):
        inner = inner.__cause__ or inner.__context__
    return inner


def _composed_first(arguments: list[str]) -> list[str]:
    """The arguments with ``--compose`` before all others, since it replaces what was read before it.

    Without it the default composition comes first, unless there is help to print, or the files are a whole run.

    Raises:
        ConfigError: a file replaces as a whole what an override changes
    """
    others: list[str] = []
    files: list[str] = []
    overrides: list[str] | None = None
    is_override = False
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        option, _, value = word.partition("=")
        if option == "--compose":
            overrides, is_override = [*(overrides or []), *([value] if value else [])], True
        elif is_override and not word.startswith("-"):
            overrides = [*(overrides or []), word]
        else:
            is_override = False
            others.append(word)
            files += [value or following] if option in ("-c", "--config") else []
    settings = _settings_in(files)
    needed = {name for name, (_, default) in _settings_of_task().items() if default is Parameter.empty}
    is_whole = settings is None or {*needed, "data"} <= settings
    for override in overrides or ():
        if settings and (is_whole or re.split(r"[./@=]", override.lstrip("+~"))[0] in settings):
            rule = "changes what the file of --config replaces"
            raise ConfigError("--compose", override, rule, "Change it in the file, or leave the node out of the file")
    if overrides is None and (is_whole or {"-h", "--help"} & {*arguments}):
        return arguments
    return [others[0], "--compose", *(overrides or []), *others[1:]]


def _settings_in(files: list[str]) -> set[str] | None:
    """The nodes of a run, such as model and data, that files of ``--config`` have; None if one cannot be read."""
    found: set[str] = set()
    for file in files:
        try:
            content = get_loader(MODE)(Path(file).read_text())
        except (OSError, yaml.YAMLError):
            return None  # which jsonargparse refuses
        for part in ("model", "data") if isinstance(content, dict) else ():
            found |= {*(content.get(part) or ())}
    return found


class Number:
    """A type for jsonargparse alone: 1 is whole, 1.0 is not.

    Of ``int | float`` it would take the first that fits, and typing caches unions without regard to their order: the
    first would depend on what was imported before.
    """


def _read_number(text: Any) -> int | float:
    if isinstance(text, bool):  # of a file: True would be 1
        raise ValueError("not a number")
    try:
        return int(text)
    except ValueError:
        return float(text)


@contextmanager
def _whole_numbers() -> Iterator[None]:
    """Within, the trainer's 1 is one batch, and 1.0 all of them."""
    number = (int, float)
    register_type(
        Number, lambda n: n, _read_number, type_check=lambda n, _: type(n) in number, fail_already_registered=False
    )
    hints = L.Trainer.__init__.__annotations__
    unions = {name: hint for name, hint in hints.items() if {*number} <= {*get_args(hint)}}
    for name, hint in unions.items():
        hints[name] = reduce(or_, [Number, *(each for each in get_args(hint) if each not in number)])
    try:
        yield
    finally:
        hints.update(unions)


def main(arguments: list[str]) -> None:
    """Run a subcommand.

    Raises:
        ConfigError: the composition is refused
        Interrupted: stopped by a signal, after saving
    """
    _refuse_values_inside(arguments)
    arguments = _composed_first(arguments)
    quieten(ignore=False)
    sys.argv = [sys.argv[0], *arguments]
    # jsonargparse reads the signature of a function of ``**settings``
    declared = _settings_of_task()
    named = [Parameter(k, Parameter.KEYWORD_ONLY, default=v, annotation=hint) for k, (hint, v) in declared.items()]
    task: Any = make_task
    task.__signature__ = Signature(named, return_annotation=L.LightningModule)
    task.__annotations__ = {parameter.name: parameter.annotation for parameter in named}
    task.__annotations__["return"] = L.LightningModule
    try:
        with _whole_numbers():
            ComposedCLI(
                make_task,
                make_data,
                auto_configure_optimizers=False,
                save_config_callback=Saved,
                save_config_kwargs={"save_to_log_dir": False},
                parser_kwargs={"parser_mode": MODE, "exit_on_error": False},
            )
    except ArgumentError as error:
        raise _unparsed(error, arguments) from None
    finally:
        leave_processes()


def _refuse_values_inside(arguments: list[str]) -> None:
    """Refuse an option inside a node that jsonargparse knows as a dictionary alone: it would read 0.01 as text."""
    for argument in arguments:
        option, _, value = argument.partition("=")
        if inside := re.fullmatch(r"--(?:model|data)\.(\w+\.[\w.]+)", option):
            path = inside[1].replace(".init_args", "")
            rule = "is inside the composition, which --compose changes"
            raise ConfigError(
                option, value, rule, f"Write --compose {path}={value or '…'}, or change it in the file of --config"
            )


def _unparsed(error: ArgumentError, arguments: list[str]) -> ConfigError:
    """The error for jsonargparse's message: `Parser key "KEY": REASON`, or a reason alone."""
    key, reason = re.fullmatch(r'(?:Parser key "([^"]+)":)?(.*)', str(error), re.DOTALL).groups()  # type: ignore[union-attr]
    path = f"--{key}" if key else "command line"
    given = _value_of(path, arguments) or " ".join(arguments)
    return ConfigError(path, given, " ".join(reason.split()), f"See: blockwright train {arguments[0]} --help")


def export(run: Run, directory: Path) -> Path:
    """Write ``lightning_cli.yaml``, from which ``fit --config`` repeats the run in a new folder, without Hydra."""
    path = directory / FILE
    write_text(path, yaml.safe_dump(to_cli(run), sort_keys=False))
    return path
