"""Checks before a directory is written or a tensor allocated; those of the model before Lightning is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.blocks.checkpoint.source import read_start
from blockwright.blocks.compose import check as check_model
from blockwright.blocks.kernels.choice import check as check_kernels
from blockwright.registry import ConfigError
from blockwright.renamed import with_moved
from blockwright.training.checkpoints.last_rate import LAST, last_rate
from blockwright.training.checkpoints.record import past_of
from blockwright.training.compiling import check_compiler
from blockwright.training.configuration import figures, packages, parts, root, trainer_settings
from blockwright.training.configuration.instantiate import check_target, instantiate
from blockwright.training.configuration.named_model import composition_of
from blockwright.training.configuration.secrets import hidden, read_from_environment, refuse_in_model
from blockwright.training.entry.start import check_surgery, find_start, outline_of
from blockwright.training.optimizers.base import OptimizerRecipe, weights
from blockwright.training.parallel.refusals import check as check_ranks
from blockwright.training.parallel.refusals import derive

if TYPE_CHECKING:
    from blockwright.training.data.modules.base import DataModule

OWN = ("dry_run", "world")  # keys of trainer defined by this project


def preflight(cfg: DictConfig, compared: bool = False) -> dict[str, Any]:
    """Check a composed configuration, and find the checkpoint that the run resumes from.

    Args:
        cfg: as composed
        compared: whether runs are compared by ``optimized_metric``

    Returns:
        the same as plain types, the model complete and ``ckpt_path`` a file

    Raises:
        ConfigError: with the path, the value, the rule and the remedy
    """
    plain = check(cfg, compared)
    find_start(plain, hidden(plain, read_from_environment(cfg)))
    return plain


def check(cfg: DictConfig, compared: bool = False) -> dict[str, Any]:
    """Check a composed configuration alone, without checkpoints or the run's folders.

    Args:
        cfg: as composed
        compared: as in ``preflight``

    Returns:
        the same as plain types, the model complete

    Raises:
        ConfigError: with the path, the value, the rule and the remedy
    """
    plain = root.check(resolved(cfg))
    packages.check(plain)
    for part in ("data", "task"):  # the model may take values from them
        refuse_missing(part, plain[part])
    refuse_in_model(plain["model"], read_from_environment(cfg))
    _check_model(plain)
    _check_trainer(plain)
    _check_optimizer(plain)
    _check_parts(plain)
    figures.check(plain, compared)
    return plain


def _check_model(plain: dict[str, Any]) -> None:
    given = isinstance(plain["model"], dict) and "pretrained" in plain["model"]
    plain["model"] = check_model(composition_of(plain["model"]))
    check_surgery(plain, patched_there=given)
    check_kernels(plain["task"].get("kernels") or {}, "task.kernels")


def _check_trainer(plain: dict[str, Any]) -> None:
    trainer_settings.check(plain["trainer"], plain["train"])
    trainer_settings.log_short_runs(plain["trainer"])
    derive(plain["trainer"])
    check_ranks(plain)
    _move_compile(plain)


def _check_optimizer(plain: dict[str, Any]) -> None:
    if plain["optimizer"].get("lr") == LAST:
        checkpoint = read_start(Path(plain["init_from"])) if plain["init_from"] else {}
        rate = last_rate(plain["optimizer"], past_of(checkpoint) if checkpoint else None)
        plain["optimizer"] = {**plain["optimizer"], "lr": rate}
    if plain["adapter"] is not None:
        check_target(plain["adapter"], "adapter")
    check_target(plain["optimizer"], "optimizer")
    _check_patterns(plain, instantiate(plain["optimizer"], "optimizer"))
    check_target(plain["scheduler"], "scheduler")
    schedule = instantiate(plain["scheduler"], "scheduler")
    steps = plain["trainer"].get("max_steps", -1)
    counts_epochs = plain["trainer"].get("max_epochs") not in (None, -1)
    if isinstance(steps, int) and plain["train"] and not (steps == -1 and counts_epochs):
        schedule.check(steps)


def _check_parts(plain: dict[str, Any]) -> None:
    """Check the data and the task, whose classes import Lightning."""
    data = parts.build("data", plain)
    data.check()
    if plain["train"] and not plain["trainer"].get("fast_dev_run"):
        data.check_run(trainer_settings.batches_of(plain["trainer"]))
    _check_fit(plain["model"], data)
    parts.check("task", plain)


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """A composed configuration as plain types.

    Raises:
        ConfigError: an interpolation has no value
    """
    try:
        return with_moved(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    except OmegaConfBaseException as error:
        path = error.full_key or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(path, "…", reason, "Fix the value that the interpolation points at") from None


def _check_patterns(plain: dict[str, Any], recipe: OptimizerRecipe) -> None:
    """Check that patterns of parameter names match some parameter, on the meta device."""
    if plain["task"].get("frozen") not in (None, []) or any(recipe.patterns().values()) or plain["adapter"]:
        recipe.check(weights(outline_of(plain)))


def refuse_missing(path: str, node: Any) -> None:
    """Refuse ``???`` anywhere in a node."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            refuse_missing(f"{path}.{key}", value)
    elif node == "???":
        raise ConfigError(path, node, "a value is required", f"Give one on the command line: {path}=…")


def _check_fit(model: dict[str, Any], data: DataModule) -> None:
    """Check that the model fits the data."""
    vocabulary = 0 if data.tokenizer is None else data.tokenizer.vocab_size
    if model["vocab_size"] < vocabulary:
        rule = f"must hold the tokenizer's vocabulary (data.tokenizer.vocab_size = {vocabulary})"
        remedy = "Raise it, or leave it at ${data.tokenizer.vocab_size}"
        raise ConfigError("model.vocab_size", model["vocab_size"], rule, remedy)
    length = getattr(data, "sequence_length", None)
    if isinstance(length, int) and length > model["max_positions"]:
        rule = f"is longer than the model's positions (model.max_positions = {model['max_positions']})"
        raise ConfigError("data.sequence_length", length, rule, "Shorten it, or raise model.max_positions")
    if (needed := data.positions) > model["max_positions"]:
        rule = f"reaches beyond the model's positions (model.max_positions = {model['max_positions']})"
        remedy = f"Raise model.max_positions to {needed}, or lower the target"
        raise ConfigError("data.transforms", needed, rule, remedy)
    depth = (model["mtp"] or {"depth": 0})["depth"]
    if isinstance(length, int) and 0 < length <= depth:
        rule = f"predicts tokens beyond the sequence (data.sequence_length = {length})"
        raise ConfigError("model.mtp.depth", depth, rule, "Predict fewer tokens, or lengthen it")


def _move_compile(plain: dict[str, Any]) -> None:
    """Move ``trainer.compile`` to the task, which implements it."""
    if not plain["trainer"].pop("compile", False):
        return
    check_compiler(str(plain["trainer"].get("accelerator")))
    plain["task"]["compile"] = True
