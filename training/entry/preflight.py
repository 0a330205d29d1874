"""Checks before Lightning is imported, a directory written or a tensor allocated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blocks.checkpoint.fits import check_fits
from blocks.checkpoint.read import read_checkpoint
from blocks.compose import check as check_model
from blocks.decoder import Decoder
from blocks.kernels.choice import check as check_kernels
from interop.source import check_init, read_composition, read_start
from interop.towers import PATH, Tower
from registry import ConfigError, did_you_mean, presets, refuse_targets, to_plain
from registry.layout import patched
from registry.limits import read_text
from training.checkpoints.last_rate import LAST, last_rate
from training.checkpoints.optimizer import check_optimizer
from training.checkpoints.places import refuse_overwriting, settle
from training.checkpoints.record import past_of, record
from training.checkpoints.resume import CHANGED, check_changes, resolve_checkpoint, say
from training.checkpoints.surgery import changed_window, check_surgery
from training.compiling import check_compiler
from training.configuration import figures, packages, trainer_settings
from training.configuration.instantiate import check_target, instantiate
from training.configuration.renamed import with_moved
from training.configuration.secrets import hidden, read_from_environment, refuse_in_model
from training.data.preflight import check as check_data
from training.data.preflight import positions_needed, tokenizer_of
from training.data.tokenizers.start import check_start
from training.parallel.refusals import check as check_ranks
from training.parallel.refusals import derive
from training.patterns import matching
from training.tasks.lookup import is_task
from training.tasks.outline import outline

ROOT = {
    *("task_name", "tags", "seed", "ckpt_path", "auto_resume", "init_from", "train", "test"),
    *("resume", "optimized_metric"),
    *(
        "model",
        "adapter",
        "surgery",
        "data",
        "task",
        "optimizer",
        "scheduler",
        "trainer",
        "callbacks",
        "logger",
        "paths",
        "extras",
    ),
}

OWN = ("dry_run", "world")  # keys of trainer defined by this project
IMPROVING = ("training.tasks.grpo.Grpo", "training.tasks.preference.Preference")
MAX_SEED = 2**32 - 1  # limit of NumPy's generators
SWITCHES = (
    "train",
    "test",
    "auto_resume",
    "extras.print_config",
    "extras.ignore_warnings",
    "extras.enforce_tags",
    "trainer.dry_run",
)


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
    _check_start(plain, record(hidden(plain, read_from_environment(cfg))))
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
    plain = {
        "resume": {"changed": CHANGED[0]},
        "adapter": None,
        "surgery": None,
        **_resolved(cfg),
    }  # older versions had no such keys
    for key, value in plain.items():
        if key not in ROOT:
            raise ConfigError(key, value, "there is no such setting", did_you_mean(key, ROOT))
    for key in sorted(ROOT - set(plain)):
        raise ConfigError(key, None, "every run has this setting", f"Leave out what removes it (e.g. ~{key})")
    packages.check(plain)
    check_seed(plain["seed"])
    _check_switches(plain)
    if plain["extras"].get("enforce_tags") and not plain["tags"]:
        raise ConfigError("tags", plain["tags"], "extras.enforce_tags requires at least one", "Write tags=[mine]")
    if (changed := (plain["resume"] or {}).get("changed")) not in CHANGED:
        rule = "is the treatment of settings that differ from the checkpoint's"
        raise ConfigError("resume.changed", changed, rule, f"Write one of {', '.join(CHANGED)}")
    if not isinstance(plain["init_from"], str | None):
        rule = "must be the path of a folder"
        remedy = "Name a run's folder, or the OUT of blockwright import: init_from=OUT"
        raise ConfigError("init_from", plain["init_from"], rule, remedy)
    given = isinstance(plain["model"], dict) and "pretrained" in plain["model"]
    refuse_in_model(plain["model"], read_from_environment(cfg))
    plain["model"] = check_model(composition_of(plain["model"]))
    _check_surgery(plain, patched_there=given)
    plain["task"] = {**plain["task"], "model": plain["model"]}
    check_kernels(plain["task"].get("kernels") or {}, "task.kernels")
    _check_fit(plain["model"], plain["data"], check_data(plain["data"]))
    figures.check(plain, compared)
    trainer_settings.check(plain["trainer"], plain["train"])
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
    instantiate(plain["optimizer"], "optimizer")
    _check_patterns(plain)
    check_target(plain["scheduler"], "scheduler")
    schedule = instantiate(plain["scheduler"], "scheduler")
    steps = plain["trainer"].get("max_steps", -1)
    counts_epochs = plain["trainer"].get("max_epochs") not in (None, -1)
    if isinstance(steps, int) and plain["train"] and not (steps == -1 and counts_epochs):
        schedule.check(steps)
    return plain


def check_seed(seed: Any, path: str = "seed") -> None:
    """Refuse a seed outside the generators' range.

    Raises:
        ConfigError
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(path, seed, f"must be an integer from 0 to {MAX_SEED:,}", f"Write {path}=0")


def refuse_random_weights(ckpt_path: Any, init_from: Any) -> None:
    """Refuse to measure random weights: without training, a checkpoint or imported weights are required.

    Raises:
        ConfigError
    """
    if ckpt_path is None and init_from is None:
        rule = "without training, only random initial weights would be measured"
        remedy = "Write ckpt_path=last or a file; or init_from=OUT for the weights of an imported model"
        raise ConfigError("ckpt_path", None, rule, remedy)


def _check_switches(plain: dict[str, Any]) -> None:
    """Refuse text for switches, since text such as ``no`` would count as true."""
    for path in SWITCHES:
        part, _, key = path.rpartition(".")
        value = (plain[part] if part else plain).get(key, False)
        if not isinstance(value, bool):
            raise ConfigError(path, value, "must be true or false", f"Write {path}=true or {path}=false")
    if not isinstance(plain["task_name"], str) or not plain["task_name"].strip("./ "):
        rule = "must be a name, of the runs' folder"
        raise ConfigError("task_name", plain["task_name"], rule, "Write a word: task_name=mine")
    if not isinstance(plain["optimized_metric"], str):
        rule = "must name the figure by which runs are compared"
        raise ConfigError("optimized_metric", plain["optimized_metric"], rule, "Write optimized_metric=val/loss")
    if plain["tags"] is not None and not isinstance(plain["tags"], list):
        raise ConfigError("tags", plain["tags"], "must be a list of words", "Write tags=[mine]")


def _resolved(cfg: DictConfig) -> dict[str, Any]:
    try:
        return with_moved(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    except OmegaConfBaseException as error:
        path = error.full_key or "configuration"
        reason = str(error).splitlines()[0]
        raise ConfigError(path, "…", reason, "Fix the value that the interpolation points at") from None


def composition_of(model: Any) -> Any:
    """The model node, or the composition that it names, patched by its other keys.

    It names a model file or an imported checkpoint. Both may be untrusted, and are read as data.
    """
    if isinstance(model, dict) and "file" in model:
        patch = {k: v for k, v in model.items() if k != "file"}
        found = to_plain(read_text(Path(str(model["file"])), "model.file"))
        if not isinstance(found, dict):
            raise ConfigError("model.file", model["file"], "must hold a mapping", "Name a YAML file of a model")
        refuse_targets(found, "model")
        return patched(presets.inherited(found), patch)
    if not isinstance(model, dict) or "pretrained" not in model:
        return model
    folder, patch = model["pretrained"], {k: v for k, v in model.items() if k != "pretrained"}
    if folder is None:
        rule = "takes the composition of a run or an imported checkpoint, but none is named"
        remedy = "Name a run's folder, or the OUT of blockwright import: init_from=OUT"
        raise ConfigError("init_from", None, rule, remedy)
    return patched(read_composition(Path(folder)), patch)


def _check_start(plain: dict[str, Any], ours: dict[str, Any]) -> None:
    """Find the start of the run: a checkpoint to resume from, imported weights, or neither.

    Args:
        plain: the configuration; its ``ckpt_path`` becomes a file or None
        ours: its record
    """
    place = settle(plain)
    path = plain["ckpt_path"] = resolve_checkpoint(plain, place, ours)
    if path and is_task(plain["task"].get("_target_")):
        checkpoint = read_checkpoint(path, shapes_only=True)
        trained = _outline(plain)
        check_fits(checkpoint, trained, path)
        if plain["train"]:
            check_optimizer(checkpoint, instantiate(plain["optimizer"], "optimizer"), trained, path)
        check_changes(path, past_of(checkpoint), ours, plain)
    refuse_overwriting(plain, place)
    _check_weights(plain)
    _check_tower(plain)
    _check_adapter(plain)
    if not (plain["train"] or plain["trainer"].get("dry_run")):
        refuse_random_weights(path, plain["init_from"])


def _check_weights(plain: dict[str, Any]) -> None:
    """Check that imported weights fit the model and the data; a resumed run has its own."""
    if plain["init_from"] is None:
        _refuse_nothing_to_operate(plain)
        _refuse_untrained(plain)
        return
    if "init_from" not in plain["task"]:
        rule = f"the task {plain['task'].get('_target_')} does not support init_from"
        raise ConfigError("init_from", plain["init_from"], rule, "Leave it out, or use task=causal_lm")
    if plain["ckpt_path"]:
        plain["task"]["init_from"] = None
    else:
        if plain["surgery"] is None:
            check_init(Path(plain["init_from"]), plain["model"])
        if (tokenizer := tokenizer_of(plain["data"])) is not None:
            check_start(plain["init_from"], tokenizer)


def _check_tower(plain: dict[str, Any]) -> None:
    """Check that the weights of a tower alone fit the model; a resumed run has its own."""
    folder = plain["task"].get("tower")
    if folder is None:
        return
    if plain["ckpt_path"]:
        plain["task"]["tower"] = None
        return
    if not isinstance(folder, str):
        raise ConfigError(PATH, folder, "must be the path of a folder", f"Write {PATH}=DIR")
    Tower(Path(folder)).check(plain["model"])


def _refuse_untrained(plain: dict[str, Any]) -> None:
    """Refuse random weights for tasks that choose among what a model can do already."""
    task = str(plain["task"].get("_target_"))
    if task in IMPROVING and plain["train"] and not (plain["ckpt_path"] or plain["trainer"].get("dry_run")):
        rule = "the task improves the answers of a trained model, and random weights give none worth choosing"
        sft = "python train.py experiment=sft_sort, then init_from=logs/sft_sort/runs/TIME"
        raise ConfigError("init_from", None, rule, f"Name a fine-tuned run: init_from=RUN; for digits to sort: {sft}")


def _check_adapter(plain: dict[str, Any]) -> None:
    """Refuse an adapter of random weights, or a start that is another; a resumed run has its own."""
    if plain["adapter"] is None:
        return
    if plain["ckpt_path"]:
        plain["task"]["adapter"] = {**plain["adapter"], "start": None}
    elif plain["init_from"] is None:
        rule = "an adapter is trained on a model that stays as it is, and this one would be random"
        raise ConfigError("init_from", None, rule, "Name its weights: init_from=RUN, or the OUT of blockwright import")
    else:
        instantiate(plain["adapter"], "adapter").read(_outline(plain))


def _outline(plain: dict[str, Any]) -> Decoder:
    adapter = plain["adapter"] and instantiate(plain["adapter"], "adapter")
    return outline(plain["model"], adapter, plain["task"].get("frozen"))


def _check_surgery(plain: dict[str, Any], patched_there: bool) -> None:
    """Compare the model with the one that its weights were trained in.

    Args:
        plain: the configuration
        patched_there: whether the composition is that of the weights, patched here
    """
    start = plain["init_from"]
    if plain["surgery"] is not None:
        check_target(plain["surgery"], "surgery")
    if start is None or plain["ckpt_path"]:
        return
    if plain["surgery"] is not None:
        operators = instantiate(plain["surgery"], "surgery").check(read_composition(Path(start)), plain["model"])
        say(f"surgery on {start}; " + "; ".join(operators or ["nothing changes"]))
        return
    allowed = patched_there or plain["resume"].get("changed") == "allow"
    past = past_of(checkpoint) if (checkpoint := read_start(Path(start))) else None
    lines = check_surgery(read_composition(Path(start)), plain["model"], str(start), allowed)
    if past is not None:
        trained = (past.settings.get("data") or {}).get("sequence_length")
        lines += [line] if (line := changed_window(plain["model"], trained)) else []
    if lines:
        say(f"starts from {start}; " + "; ".join(lines))


def _refuse_nothing_to_operate(plain: dict[str, Any]) -> None:
    if plain["surgery"] is not None and not plain["ckpt_path"]:
        rule = "puts the weights of a trained model into another, and none is named"
        raise ConfigError("init_from", None, rule, "Name a run: init_from=RUN; or leave surgery out")


def _check_patterns(plain: dict[str, Any]) -> None:
    """Check that patterns of parameter names match some parameter, on the meta device."""
    frozen, multipliers = plain["task"].get("frozen"), plain["optimizer"].get("multipliers")
    if frozen not in (None, []) or multipliers or plain["adapter"]:
        names = [name for name, _ in _outline(plain).named_parameters()]
        matching(names, list(multipliers or {}), "optimizer.multipliers")


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
    asked = plain["trainer"].pop("compile", False)
    if not isinstance(asked, bool):
        raise ConfigError("trainer.compile", asked, "must be true or false", "Write trainer.compile=true")
    if not asked:
        return
    if not is_task(plain["task"].get("_target_")):
        rule = f"the task {plain['task'].get('_target_')} does not support compilation"
        raise ConfigError("trainer.compile", True, rule, "Leave it out, or use task=causal_lm")
    check_compiler(str(plain["trainer"].get("accelerator")))
    plain["task"]["compile"] = True
