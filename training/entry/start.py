"""What a run starts from: a checkpoint of its own past, the weights of another model, a part of them, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.read import check_fits, read_checkpoint
from blockwright.blocks.checkpoint.source import read_composition
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.training.checkpoints.find import refuse_overwriting
from blockwright.training.checkpoints.record import past_of, record
from blockwright.training.checkpoints.resume import check_changes, check_optimizer, say
from blockwright.training.configuration import parts
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import Run
from blockwright.training.data.tokenizers.rebuild import check_start
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.starts import outline


def check_sources(run: Run) -> None:
    """Check what the run starts from: a checkpoint to resume from, the weights of another model, or neither.

    Raises:
        ConfigError: it does not fit the run
    """
    if run.ckpt_path:
        check_resumed(run)
    refuse_overwriting(run)
    if not run.ckpt_path:
        # Check that the weights to start from fit the model and the data; a resumed run has its own
        for start in parts.starts(run):
            _print(start.check(run.model))
        if run.init_from is not None and (tokenizer := parts.build("data", run).tokenizer) is not None:
            check_start(run.init_from, tokenizer)
    if not (run.train or run.trainer.get("dry_run")):
        refuse_random_weights(run.ckpt_path, run.init_from)


def check_resumed(run: Run) -> None:
    """Compare a run with its checkpoint, and report what has changed since.

    Raises:
        ConfigError: its weights or its optimizer's state do not fit, or mean something else here
    """
    path = str(run.ckpt_path)
    checkpoint, trained = read_checkpoint(path, shapes_only=True), outline_of(run)
    check_fits(checkpoint, trained, path)
    if run.train:
        check_optimizer(checkpoint, recipe_of(run), trained, path)
    check_changes(path, past_of(checkpoint), record(run.shown), run)


def compare_start(run: Run) -> None:
    """Compare the model with the one that the weights of ``init_from`` were trained in; print what changes.

    Raises:
        ConfigError: a start cannot make its weights from them
    """
    starts = parts.starts(run)  # a mistake in their settings is refused whether they are read or not
    if run.init_from is None or run.ckpt_path:
        return
    allowed = run.is_patched or run.resume.get("changed") == "allow"
    trained = read_composition(Path(run.init_from))
    for start in starts:
        _print(start.compare(trained, run.model, allowed))


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        say(line)


def recipe_of(plain: Mapping[str, Any]) -> OptimizerRecipe:
    """The recipe of the optimizer, with the factors of the parametrisation."""
    recipe: OptimizerRecipe = instantiate(plain["optimizer"], "optimizer")
    return recipe.scaled(parts.parametrisation(plain).scales(recipe))


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
