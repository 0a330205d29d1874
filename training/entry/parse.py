"""Parse a composed configuration into a ``Run``.

What follows from other settings or from files is worked out here, once. Nothing after it changes the run: checks read
it, ``execute`` builds from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.blocks.checkpoint.source import read_start
from blockwright.blocks.compose import check as complete
from blockwright.registry import ConfigError
from blockwright.registry.ranges import Count, Whole
from blockwright.registry.schema import conforms
from blockwright.renamed import with_moved
from blockwright.training.checkpoints.find import settled
from blockwright.training.checkpoints.record import past_of, record
from blockwright.training.checkpoints.resume import LAST, last_rate, resolve_checkpoint
from blockwright.training.configuration.named_model import composition_of, is_patched
from blockwright.training.configuration.placeholders import read_from_environment, refuse_in_model
from blockwright.training.configuration.run import Node, Run
from blockwright.training.jobs import sweep_of
from blockwright.training.processes import launched

OmegaConf.register_new_resolver("sweep_of", sweep_of, replace=True)


def parse(cfg: DictConfig) -> Run:
    """Parse the configuration of a run that may be executed: its checkpoints are in their folder, or resolved.

    Raises:
        ConfigError: of ``parse_settings``; or there is no checkpoint to resume from
    """
    run = settled(parse_settings(cfg))
    ours = cache(lambda: record(run.shown))  # only if it is compared: it imports the classes of callbacks, so Lightning
    return replace(run, ckpt_path=resolve_checkpoint(run, ours))


def parse_settings(cfg: DictConfig) -> Run:
    """Parse a configuration without looking at the folders of runs.

    Raises:
        ConfigError: a setting of the run or of its model is missing or invalid, or an interpolation leads nowhere
    """
    run = Run.of(_resolved(cfg), read_from_environment(cfg))
    for part in ("data", "task"):  # the model may take values from them
        _refuse_missing(part, run[part])
    refuse_in_model(run.model, run.secrets)
    chosen = run.trainer.get("compile", "auto")
    return replace(
        run,
        is_patched=is_patched(run.model),
        model=complete(composition_of(run.model)),
        task={**run.task, **({"compile": chosen} if chosen != "auto" else {})},
        trainer=_launched(run.trainer),
        optimizer=_with_rate(run.optimizer, run.init_from),
    )


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain types, names of older versions replaced."""
    try:
        return with_moved(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    except OmegaConfBaseException as error:
        path = error.full_key or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(path, "…", reason, "Fix the value that the interpolation points at") from None


def _refuse_missing(path: str, node: Any) -> None:
    """Refuse ``???`` anywhere in a node."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            _refuse_missing(f"{path}.{key}", value)
    elif node == "???":
        raise ConfigError(path, node, "a value is required", f"Give one on the command line: {path}=…")


def _launched(trainer: Node) -> Node:
    """The trainer's settings with the devices that torchrun or Slurm has started, and with a last step that is logged.

    A run with fewer steps than ``log_every_n_steps`` would have no curve and no speed.
    """
    every, steps = trainer.get("log_every_n_steps"), trainer.get("max_steps", -1)
    short = conforms(every, Whole) and conforms(steps, Count) and steps < every
    return {**trainer, **launched(), **({"log_every_n_steps": steps} if short else {})}


def _with_rate(optimizer: Node, init_from: str | None) -> Node:
    """The optimizer's settings with ``lr=last`` as the rate at which the run that the weights come from has ended."""
    if optimizer.get("lr") != LAST:
        return optimizer
    checkpoint = read_start(Path(init_from)) if init_from else {}
    return {**optimizer, "lr": last_rate(optimizer, past_of(checkpoint) if checkpoint else None)}
