"""Placeholders in saved configurations: the run's folder (``${run_dir}``) and secrets (``${oc.env:NAME}``).

So every command that uses the configuration writes to its own folder and never to the old run's, and the file can be
moved to another machine.

Values read from the environment may be passwords or keys, so no file has them: ``logger.wandb.api_key=${oc.env:KEY}``
works, and files of the run contain ``${oc.env:KEY}`` in its place.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.registry import ConfigError
from blockwright.training.processes import is_first

if TYPE_CHECKING:
    import lightning as L
    from jsonargparse import Namespace

PLACES = {"PROJECT_ROOT"}  # variables with a folder, which may be written
SHORTEST = 6  # characters: shorter values are not secrets, and would match unrelated words


def read_from_environment(cfg: DictConfig) -> dict[str, str]:
    """Values that resolving a configuration reads from the environment → their interpolation."""
    taken: dict[str, str] = {}

    def look(name: str, *default: Any) -> Any:
        value = before(name, *default)
        if isinstance(value, str) and len(value) >= SHORTEST and name not in PLACES:
            taken[value] = f"${{oc.env:{name}}}"
        return value

    from omegaconf.resolvers import oc

    before = oc.env
    OmegaConf.register_new_resolver("oc.env", look, replace=True)
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException:  # reported where it matters
        pass
    finally:
        OmegaConf.register_new_resolver("oc.env", before, replace=True)
    return taken


def hidden(value: Any, taken: Mapping[str, str]) -> Any:
    """Plain values with values from the environment replaced by their interpolation."""
    if isinstance(value, Mapping):
        return {key: hidden(inner, taken) for key, inner in value.items()}
    if isinstance(value, list):
        return [hidden(inner, taken) for inner in value]
    if isinstance(value, str):
        for secret, name in taken.items():
            value = value.replace(secret, name)
    return value


def refuse_in_model(model: Any, taken: Mapping[str, str], path: str = "model") -> None:
    """Refuse values from the environment in a composition, which is stored in every checkpoint.

    Raises:
        ConfigError
    """
    items = model.items() if isinstance(model, Mapping) else enumerate(model) if isinstance(model, list) else ()
    for key, inner in items:
        refuse_in_model(inner, taken, f"{path}.{key}")
    if isinstance(model, str) and (shown := hidden(model, taken)) != model:
        rule = "comes from the environment, but the composition is written to every checkpoint"
        raise ConfigError(path, shown, rule, "Write the value itself, if it is not a secret")


RUN_DIR, NOW = "${run_dir}", "${now}"
SECRET = re.compile(r"\$\{oc\.env:(\w+)\}")
ANY = "/run_dir"  # stands for a folder not yet chosen; ``portable`` replaces it
KEPT = ("lightning_cli.yaml", "checkpoints")  # in the folder of a run


def template(log_dir: str, task_name: str) -> str:
    """Folder of new runs of a task: ``logs/train/cli/${now}``."""
    return f"{log_dir}/{task_name}/cli/{NOW}"


def portable(value: Any, folder: str) -> Any:
    """Plain values with ``${run_dir}`` in place of a folder in all strings."""
    named = re.compile(rf"(?<![\w.-]){re.escape(folder.rstrip('/'))}(?=/|$)")
    return _texts(value, lambda text: named.sub(RUN_DIR, text))


def choose(run_dir: str, resumed: str | None = None) -> str:
    """Choose the folder of this run, also for the processes that it starts.

    Args:
        run_dir: as configured; ``${now}`` in it becomes the time
        resumed: the checkpoint to resume from, whose run may continue in its own folder

    Raises:
        ConfigError: the folder is not empty
    """
    chosen = run_dir.replace(NOW, f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")
    if is_first():
        folder = Path(chosen)
        free = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        own = resumed is not None and Path(resumed).resolve().parent.parent == folder.resolve()
        if not free and not own:
            rule = "is the folder of a new run, but is not empty"
            raise ConfigError("run_dir", chosen, rule, "Leave out --run_dir, or name a folder that is new or empty")
        sys.argv.append(f"--run_dir={chosen}")  # Lightning starts the other processes with these arguments
    return chosen


def beside(run_dir: str) -> str:
    """The folder for reusing a configuration whose run's folder was named: a new one beside it."""
    return run_dir if NOW in run_dir else f"{Path(run_dir).parent}/{NOW}"


def filled(settings: Namespace, run_dir: str) -> Namespace:
    """A configuration with ``${run_dir}`` replaced by a folder, and secrets by their values in the environment.

    Older files have the folder of the run that wrote them where the trainer writes; that is replaced too, but not the
    path of a checkpoint to read.

    Args:
        settings: of a subcommand
        run_dir: the folder
    """
    old = settings.trainer.get("default_root_dir")
    if old is None:
        settings.trainer.default_root_dir = RUN_DIR
    elif any((Path(old) / kept).exists() for kept in KEPT):
        settings.trainer = portable(settings.trainer, str(old))
    return _texts(settings, lambda text: SECRET.sub(_from_environment, text.replace(RUN_DIR, run_dir)))


def _from_environment(found: re.Match[str]) -> str:
    return os.environ.get(found[1], found[0])


def refuse_to_overwrite(trainer: L.Trainer, ckpt_path: str | None) -> None:
    """Refuse to write checkpoints where another run has its own.

    Args:
        trainer: with its callbacks
        ckpt_path: the checkpoint to resume from, whose run may continue in its own folder

    Raises:
        ConfigError
    """
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if not folder or not any(Path(folder).glob("*.ckpt")):
        return
    if ckpt_path is None or Path(ckpt_path).resolve().parent != Path(folder).resolve():
        rule = "holds the checkpoints of another run, which this one would overwrite"
        raise ConfigError("checkpoint.dirpath", str(folder), rule, f"Name another folder in the file, or {RUN_DIR}")


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """Plain values and namespaces with every string changed."""
    if isinstance(value, str):
        return change(value)
    from jsonargparse import Namespace  # here: every start reads this file, and few have one

    if isinstance(value, Namespace):
        return Namespace(**{key: _texts(inner, change) for key, inner in vars(value).items()})
    if isinstance(value, Mapping):
        return {key: _texts(inner, change) for key, inner in value.items()}
    return [_texts(inner, change) for inner in value] if isinstance(value, list) else value
