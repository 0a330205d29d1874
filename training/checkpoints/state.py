"""What a checkpoint holds beside weights: the position in training, and the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.training.optimizers.recipe import OptimizerRecipe

if TYPE_CHECKING:
    import lightning as L

# --- the position in training that a checkpoint holds: between two optimizer steps, whichever hook writes it ---


def between_steps(trainer: L.Trainer, loops: dict[str, Any]) -> None:
    """Put the loops of a checkpoint where a resumed run can continue: at the end of the last optimizer step.

    No file holds the gradients of a step in progress, so all its micro-batches are computed again. Lightning would

    * continue with the rest of them, and count the batch and the step in progress as done;
    * give an epoch of which no batch has begun the batches of the one before, and end it at once;
    * add a batch to an epoch that has ended without a validation;
    * count an epoch as ended in which training was stopped, by its time or a callback.

    Args:
        trainer: at any hook
        loops: the fit loop's state in the checkpoint, changed in place
    """
    loop, batches = trainer.fit_loop.epoch_loop, loops["epoch_loop.batch_progress"]
    now: Any = loop.batch_progress.current  # whose class Lightning does not declare
    epoch: Any = trainer.fit_loop.epoch_progress.current
    both = (loops["epoch_progress"]["total"], loops["epoch_progress"]["current"])
    ended, unbegun = epoch.processed == epoch.ready, epoch.ready > epoch.started
    stopped = ended and epoch.ready > 0 and not loop._num_ready_batches_reached()
    if stopped and trainer.should_stop:
        for counts in both:
            counts["processed"] = counts["completed"] = counts["ready"] - 1
    if not stopped and (ended or unbegun):
        for counts in both:
            counts["completed"] = counts["processed"]
        batches |= {"current": dict.fromkeys(batches["current"], 0), "is_last_batch": False}
        return
    if now.ready > now.processed or loop._should_accumulate():
        _back(batches, now.processed % trainer.accumulate_grad_batches)
        step = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        for counts in (step["total"], step["current"]):
            counts["ready"] = counts["completed"]


def _back(batches: dict[str, Any], micro_batches: int) -> None:
    """Take back micro-batches, and the batch in progress."""
    for counts in (batches["total"], batches["current"]):
        counts.update(dict.fromkeys(counts, counts["processed"] - micro_batches))
    batches["is_last_batch"] = False


# --- check that the optimizer state in a checkpoint fits the optimizer of a run ---


Groups = list[tuple[str, list[str]]]  # name of each group, and of its parameters


def check_optimizer(checkpoint: Mapping[str, Any], recipe: Any, decoder: Decoder, path: str) -> None:
    """Refuse to train with an optimizer for which the checkpoint has no state.

    Args:
        checkpoint: from ``blockwright.blocks.checkpoint.read.read_checkpoint``
        recipe: of this run; anything but an OptimizerRecipe is not checked
        decoder: on the meta device, with its adapters and frozen parts
        path: of the checkpoint, for the error message

    Raises:
        ConfigError
    """
    if not checkpoint.get("optimizer_states"):
        rule = "holds weights but no training state, so training cannot resume from it"
        raise ConfigError(
            "ckpt_path", path, rule, "Use the last.ckpt of a training, or write train=false to measure it"
        )
    names = checkpoint.get("optimizer_parameters")
    if not names or not isinstance(recipe, OptimizerRecipe):
        return
    theirs, ours = _groups_of(checkpoint["optimizer_states"][0], names[0]), _groups_for(recipe, decoder)
    if theirs != ours:
        name = type(recipe).__name__
        rule = (
            f"{path} holds the state of another optimizer: its groups are {_described(theirs)}, here {_described(ours)}"
        )
        raise ConfigError("optimizer", name, rule, f"Resume with the optimizer that wrote it; {name} needs a new run")


def _groups_of(state: Mapping[str, Any], names: list[str]) -> Groups:
    return [(str(group.get("name")), [names[i] for i in group["params"]]) for group in state["param_groups"]]


def _groups_for(recipe: OptimizerRecipe, decoder: Decoder) -> Groups:
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    groups = recipe.build(decoder).param_groups
    return [(str(group.get("name")), [names[id(p)] for p in group["params"]]) for group in groups]


def _described(groups: Groups) -> str:
    return ", ".join(f"{name} ({len(parameters)} parameters)" for name, parameters in groups)
