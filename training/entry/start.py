"""What a run starts from: a checkpoint of its own past, the weights of another model, a part of them, or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.fits import check_fits
from blockwright.blocks.checkpoint.read import read_checkpoint
from blockwright.blocks.checkpoint.source import check_init, read_composition, read_start
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError, plugins
from blockwright.training.checkpoints.optimizer import check_optimizer
from blockwright.training.checkpoints.places import refuse_overwriting
from blockwright.training.checkpoints.record import past_of, record
from blockwright.training.checkpoints.resume import check_changes, say
from blockwright.training.checkpoints.surgery import changed_window
from blockwright.training.checkpoints.surgery import check_surgery as check_swaps
from blockwright.training.configuration import parts
from blockwright.training.configuration.instantiate import check_target, instantiate
from blockwright.training.configuration.run import Run
from blockwright.training.data.tokenizers.start import check_start
from blockwright.training.tasks.outline import outline


def check_sources(run: Run) -> None:
    """Check what the run starts from: a checkpoint to resume from, the weights of another model, or neither.

    Raises:
        ConfigError: it does not fit the run
    """
    if run.ckpt_path:
        check_resumed(run)
    refuse_overwriting(run)
    _check_weights(run)
    check_tower(run)
    _check_adapter(run)
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
        check_optimizer(checkpoint, instantiate(run.optimizer, "optimizer"), trained, path)
    check_changes(path, past_of(checkpoint), record(run.shown), run)


def _check_weights(plain: Mapping[str, Any]) -> None:
    """Check that imported weights fit the model and the data; a resumed run has its own."""
    if plain["init_from"] is None:
        _refuse_nothing_to_operate(plain)
        return
    if plain["ckpt_path"]:
        return
    if plain["surgery"] is None:
        check_init(Path(plain["init_from"]), plain["model"])
    if (tokenizer := parts.build("data", plain).tokenizer) is not None:
        check_start(plain["init_from"], tokenizer)


TOWER = "task.tower"


def check_tower(plain: Mapping[str, Any]) -> None:
    """Check that the weights of a tower alone fit the model; a resumed run has its own."""
    folder = plain["task"].get("tower")
    if folder is None or plain["ckpt_path"]:
        return
    if not isinstance(folder, str):
        raise ConfigError(TOWER, folder, "must be the path of a folder", f"Write {TOWER}=DIR")
    plugins.offered(plugins.WEIGHTS, "tower", TOWER)(Path(folder)).check(plain["model"])


def _check_adapter(plain: Mapping[str, Any]) -> None:
    """Refuse an adapter of random weights, or a start that is another; a resumed run has its own."""
    if plain["adapter"] is None or plain["ckpt_path"]:
        return
    if plain["init_from"] is None:
        rule = "an adapter is trained on a model that stays as it is, and this one would be random"
        raise ConfigError("init_from", None, rule, "Name its weights: init_from=RUN, or the OUT of blockwright import")
    else:
        instantiate(plain["adapter"], "adapter").read(outline_of(plain))


def check_surgery(plain: Mapping[str, Any], patched_there: bool) -> None:
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
        planned = instantiate(plain["surgery"], "surgery").check(read_composition(Path(start)), plain["model"])
        say(f"surgery on {start}; " + "; ".join(planned.report() or ["nothing changes"]))
        return
    allowed = patched_there or plain["resume"].get("changed") == "allow"
    past = past_of(checkpoint) if (checkpoint := read_start(Path(start))) else None
    lines = check_swaps(read_composition(Path(start)), plain["model"], str(start), allowed)
    if past is not None:
        trained = (past.settings.get("data") or {}).get("sequence_length")
        lines += [line] if (line := changed_window(plain["model"], trained)) else []
    if lines:
        say(f"starts from {start}; " + "; ".join(lines))


def _refuse_nothing_to_operate(plain: Mapping[str, Any]) -> None:
    if plain["surgery"] is not None and not plain["ckpt_path"]:
        rule = "puts the weights of a trained model into another, and none is named"
        raise ConfigError("init_from", None, rule, "Name a run: init_from=RUN; or leave surgery out")


def outline_of(plain: Mapping[str, Any]) -> Decoder:
    """The model as it is trained, on the meta device."""
    adapter = plain["adapter"] and instantiate(plain["adapter"], "adapter")
    return outline(plain["model"], adapter, plain["task"].get("frozen"))


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
