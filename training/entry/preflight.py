"""Checks before Lightning is imported, a directory written or a tensor allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.blocks.compose import check as check_model
from blockwright.blocks.kernels.choice import check as check_kernels
from blockwright.interop.source import read_start
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.last_rate import LAST, last_rate
from blockwright.training.checkpoints.record import past_of
from blockwright.training.compiling import check_compiler
from blockwright.training.configuration import figures, packages, root, trainer_settings
from blockwright.training.configuration.instantiate import check_target, instantiate
from blockwright.training.configuration.named_model import composition_of
from blockwright.training.configuration.renamed import with_moved
from blockwright.training.configuration.secrets import hidden, read_from_environment, refuse_in_model
from blockwright.training.data.preflight import check as check_data
from blockwright.training.data.preflight import positions_needed, refuse_missing
from blockwright.training.entry.start import check_surgery, find_start, outline_of
from blockwright.training.optimizers.base import OptimizerRecipe, weights
from blockwright.training.parallel.refusals import check as check_ranks
from blockwright.training.parallel.refusals import derive
from blockwright.training.tasks.lookup import is_task

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
    plain = root.check(_resolved(cfg))
    packages.check(plain)
    refuse_missing("data", plain["data"])  # the model may take values from it
    refuse_missing("task", {key: value for key, value in plain["task"].items() if key != "model"})
    given = isinstance(plain["model"], dict) and "pretrained" in plain["model"]
    refuse_in_model(plain["model"], read_from_environment(cfg))
    plain["model"] = check_model(composition_of(plain["model"]))
    check_surgery(plain, patched_there=given)
    plain["task"] = {**plain["task"], "model": plain["model"]}
    check_kernels(plain["task"].get("kernels") or {}, "task.kernels")
    _check_fit(plain["model"], plain["data"], check_data(plain["data"]))
    figures.check(plain, compared)
    trainer_settings.check(plain["trainer"], plain["train"])
    trainer_settings.log_short_runs(plain["trainer"])
    derive(plain["trainer"])
    check_ranks(plain)
    _move_compile(plain)
    if plain["optimizer"].get("lr") == LAST:
        checkpoint = read_start(Path(plain["init_from"])) if plain["init_from"] else {}
        rate = last_rate(plain["optimizer"], past_of(checkpoint) if checkpoint else None)
        plain["optimizer"] = {**plain["optimizer"], "lr": rate}
        plain["task"] = {**plain["task"], "optimizer": plain["optimizer"]}
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
    return plain


def _resolved(cfg: DictConfig) -> dict[str, Any]:
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


def _check_fit(model: dict[str, Any], data: dict[str, Any], vocabulary: int | None) -> None:
    """Check that the model fits the data."""
    if isinstance(vocabulary, int) and model["vocab_size"] < vocabulary:
        rule = f"must hold the tokenizer's vocabulary (data.tokenizer.vocab_size = {vocabulary})"
        remedy = "Raise it, or leave it at ${data.tokenizer.vocab_size}"
        raise ConfigError("model.vocab_size", model["vocab_size"], rule, remedy)
    length = data.get("sequence_length")
    if isinstance(length, int) and length > model["max_positions"]:
        rule = f"is longer than the model's positions (model.max_positions = {model['max_positions']})"
        raise ConfigError("data.sequence_length", length, rule, "Shorten it, or raise model.max_positions")
    if vocabulary is not None and (needed := positions_needed(data)) > model["max_positions"]:
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
    if not is_task(plain["task"].get("_target_")):
        rule = f"the task {plain['task'].get('_target_')} does not support compilation"
        raise ConfigError("trainer.compile", True, rule, "Leave it out, or use task=causal_lm")
    check_compiler(str(plain["trainer"].get("accelerator")))
    plain["task"]["compile"] = True
