"""Check that the optimizer state in a checkpoint fits the optimizer of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError
from blockwright.training.optimizers.base import OptimizerRecipe

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
