"""What a run starts from: a checkpoint of its own past, the weights of another model, a part of them, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.fits import check_fits
from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.blocks.checkpoint.source import read_composition
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.optimizer import check_optimizer
from blockwright.training.checkpoints.places import refuse_overwriting, settle
from blockwright.training.checkpoints.record import past_of, record
from blockwright.training.checkpoints.resume import check_changes, resolve_checkpoint, say
from blockwright.training.configuration import parts
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.data.tokenizers.start import check_start
from blockwright.training.tasks.outline import outline


def find_start(plain: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Find the start of the run: a checkpoint to resume from, the weights of another model, or neither.

    Args:
        plain: the configuration; its ``ckpt_path`` becomes a file or None, and a sweep's job gets its own folder of
            checkpoints. Nothing that is recorded changes
        given: a copy of it, without secrets

    Raises:
        ConfigError: it does not fit the run
    """
    ours = cache(lambda: record(given))  # made when it is compared: it imports the classes of callbacks, so Lightning
    place = settle(plain)
    path = plain["ckpt_path"] = resolve_checkpoint(plain, place, ours)
    if path:
        checkpoint = read_checkpoint(path, shapes_only=True)
        trained = outline_of(plain)
        check_fits(checkpoint, trained, path)
        if plain["train"]:
            check_optimizer(checkpoint, instantiate(plain["optimizer"], "optimizer"), trained, path)
        check_changes(path, past_of(checkpoint), ours(), plain)
    refuse_overwriting(plain, place)
    if not path:
        _check_starts(plain)
    if not (plain["train"] or plain["trainer"].get("dry_run")):
        refuse_random_weights(path, plain["init_from"])


def _check_starts(plain: Mapping[str, Any]) -> None:
    """Check that the weights to start from fit the model and the data; a resumed run has its own."""
    for start in parts.starts(plain):
        _print(start.check(plain["model"]))
    if plain["init_from"] is not None and (tokenizer := parts.build("data", plain).tokenizer) is not None:
        check_start(plain["init_from"], tokenizer)


def compare_start(plain: Mapping[str, Any], patched: bool) -> None:
    """Compare the model with the one that the weights of ``init_from`` were trained in; print what changes.

    Args:
        plain: the configuration
        patched: whether the composition is that of the weights, patched here

    Raises:
        ConfigError: a start cannot make its weights from them
    """
    starts = parts.starts(plain)  # a mistake in their settings is refused whether they are read or not
    if plain["init_from"] is None or plain["ckpt_path"]:
        return
    allowed = patched or plain["resume"].get("changed") == "allow"
    trained = read_composition(Path(plain["init_from"]))
    for start in starts:
        _print(start.compare(trained, plain["model"], allowed))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def outline_of(plain: Mapping[str, Any]) -> Decoder:
    """The model as it is trained, on the meta device."""
    return outline(plain["model"], parts.starts(plain), plain["task"].get("frozen"))


def refuse_random_weights(ckpt_path: Any, init_from: Any) -> None:
    """Refuse to measure random weights: without training, a checkpoint or imported weights are required.

    Raises:
        ConfigError
    """
    if ckpt_path is None and init_from is None:
        rule = "without training, only random initial weights would be measured"
        remedy = "Write ckpt_path=last or a file; or init_from=OUT for the weights of an imported model"
        raise ConfigError("ckpt_path", None, rule, remedy)


def refuse_untrained(plain: Mapping[str, Any]) -> None:
    """Refuse random weights for a task that chooses among what a model can do already.

    Raises:
        ConfigError
    """
    started = plain["ckpt_path"] or plain["init_from"] or plain["trainer"].get("dry_run")
    if plain["train"] and not started and parts.class_of("task", plain).improves:
        rule = "the task improves the answers of a trained model, and random weights give none worth choosing"
        sft = "blockwright train experiment=sft_sort, then init_from=logs/sft_sort/runs/TIME"
        raise ConfigError("init_from", None, rule, f"Name a fine-tuned run: init_from=RUN; for digits to sort: {sft}")
