"""Whether the state of an optimizer in a checkpoint is that of the optimizer a run asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocks.compose import compose
from registry import ConfigError
from training.optimizers.base import OptimizerRecipe

Groups = list[tuple[str, list[str]]]  # name of each group, and of its parameters


def check_optimizer(checkpoint: Mapping[str, Any], recipe: Any, model: Mapping[str, Any], path: str) -> None:
    """Refuse to train on with an optimizer that the checkpoint holds no state of.

    Args:
        checkpoint: of ``blocks.checkpoint.read.read_checkpoint``
        recipe: of this run; anything that is no OptimizerRecipe is not looked at
        model: a composition that fits the weights
        path: of the checkpoint, for the message

    Raises:
        ConfigError
    """
    if not checkpoint.get("optimizer_states"):
        rule = "holds weights and no state of a training, so no training can resume from it"
        raise ConfigError("ckpt_path", path, rule, "Use a last.ckpt of train.py, or write train=false to measure it")
    names = checkpoint.get("optimizer_parameters")
    if not names or not isinstance(recipe, OptimizerRecipe):
        return
    theirs, ours = _groups_of(checkpoint["optimizer_states"][0], names[0]), _groups_for(recipe, model)
    if theirs != ours:
        name = type(recipe).__name__
        rule = f"{path} holds the state of another optimizer: its groups are {_told(theirs)}, here {_told(ours)}"
        raise ConfigError("optimizer", name, rule, f"Resume with the optimizer that wrote it; {name} needs a new run")


def _groups_of(state: Mapping[str, Any], names: list[str]) -> Groups:
    return [(str(group.get("name")), [names[i] for i in group["params"]]) for group in state["param_groups"]]


def _groups_for(recipe: OptimizerRecipe, model: Mapping[str, Any]) -> Groups:
    decoder = compose(model, device="meta")
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    groups = recipe.build(decoder).param_groups
    return [(str(group.get("name")), [names[id(p)] for p in group["params"]]) for group in groups]


def _told(groups: Groups) -> str:
    return ", ".join(f"{name} ({len(parameters)} parameters)" for name, parameters in groups)
