"""Everything that can be refused before Lightning is imported, a directory written or a tensor allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blocks.compose import check as check_model
from registry import ConfigError, did_you_mean
from training.data.preflight import check as check_data
from training.targets import check_target, instantiate

ROOT = {
    *("task_name", "tags", "seed", "ckpt_path", "train", "test", "optimized_metric"),
    *("model", "data", "task", "optimizer", "scheduler", "trainer", "callbacks", "logger", "paths", "extras"),
}


def preflight(cfg: DictConfig) -> dict[str, Any]:
    """Check a composed configuration.

    Returns:
        the same as plain types, the model complete and ``ckpt_path`` a file

    Raises:
        ConfigError: with the path, the value, the rule and the remedy
    """
    plain = _resolved(cfg)
    for key, value in plain.items():
        if key not in ROOT:
            raise ConfigError(key, value, "there is no such setting", did_you_mean(key, ROOT))
    if not isinstance(plain["seed"], int):
        raise ConfigError("seed", plain["seed"], "must be an integer", "Write seed=0")
    if plain["extras"].get("enforce_tags") and not plain["tags"]:
        raise ConfigError("tags", plain["tags"], "extras.enforce_tags asks for at least one", "Write tags=[mine]")
    plain["model"] = check_model(plain["model"])
    plain["task"] = {**plain["task"], "model": plain["model"]}
    check_data(plain["data"])
    _check_fit(plain["model"], plain["data"])
    check_target(plain["optimizer"], "optimizer")
    instantiate(plain["optimizer"], "optimizer")
    check_target(plain["scheduler"], "scheduler")
    schedule = instantiate(plain["scheduler"], "scheduler")
    steps = plain["trainer"].get("max_steps", -1)
    if isinstance(steps, int) and steps > 0 and plain["train"]:
        schedule.check(steps)
    plain["ckpt_path"] = resolve_checkpoint(plain["ckpt_path"], plain)
    if not plain["train"] and plain["test"] and plain["ckpt_path"] is None:
        raise ConfigError("ckpt_path", None, "testing without training needs one", "Write ckpt_path=last or a file")
    return plain


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    try:
        return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        path = error.full_key or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(path, "…", reason, "Mend the value that the interpolation points at") from None


def _check_fit(model: dict[str, Any], data: dict[str, Any]) -> None:
    """What the model and the data must agree on."""
    vocabulary = (data.get("tokenizer") or {}).get("vocab_size")
    if isinstance(vocabulary, int) and model["vocab_size"] < vocabulary:
        rule = f"must hold the tokenizer's vocabulary (data.tokenizer.vocab_size = {vocabulary})"
        remedy = "Raise it, or leave it at ${data.tokenizer.vocab_size}"
        raise ConfigError("model.vocab_size", model["vocab_size"], rule, remedy)
    length = data.get("sequence_length")
    if isinstance(length, int) and length > model["max_positions"]:
        rule = f"is longer than the model is made for (model.max_positions = {model['max_positions']})"
        raise ConfigError("data.sequence_length", length, rule, "Shorten it, or raise model.max_positions")


def resolve_checkpoint(ckpt_path: Any, plain: dict[str, Any]) -> str | None:
    """``last`` → the newest ``last.ckpt`` among the runs of this task; a path → itself, if there is such a file."""
    if ckpt_path is None:
        return None
    if ckpt_path == "last":
        runs = Path(plain["paths"]["log_dir"]) / plain["task_name"]
        found = sorted(runs.glob("**/checkpoints/last.ckpt"), key=lambda p: p.stat().st_mtime)
        if not found:
            rule = f"no run under {runs} has left a last.ckpt"
            raise ConfigError("ckpt_path", "last", rule, "Name the file: ckpt_path=RUN/checkpoints/last.ckpt")
        return str(found[-1])
    if not Path(str(ckpt_path)).exists():
        raise ConfigError("ckpt_path", ckpt_path, "there is no such file", "Write ckpt_path=last, or an existing file")
    return str(ckpt_path)
