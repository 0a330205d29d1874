"""What a run gives to its task beside the objective's own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockwright.blocks.kernels import choice
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Seed
from blockwright.training.optimizers.base import OptimizerRecipe
from blockwright.training.parallel.recompute import Recompute
from blockwright.training.parallel.recompute import check as check_recompute
from blockwright.training.parametrisations.base import Parametrisation
from blockwright.training.parametrisations.standard import Standard
from blockwright.training.schedulers import Schedule
from blockwright.training.starts.base import Start

# Of the run, from the root of its configuration; the other fields of ``Setup`` are settings of ``task``.
CONTEXT = ("model", "optimizer", "scheduler", "parametrisation", "seed", "starts")


@enforced("task")
@dataclass(frozen=True)
class Setup:
    """The model of a run and how it is trained, whatever the objective.

    Args:
        model: composition of the decoder, as plain types (the ``model`` node)
        optimizer: recipe of the optimizer
        scheduler: factor on the learning rate over the steps
        parametrisation: factors on initial values and rates of single weights
        seed: of the initial weights and all random draws of training
        starts: where weights come from, in the order in which they fill the decoder; none for random ones. A resumed
            run takes those of its checkpoint. With ``trainer.ckpt_path = FILE`` before ``fit`` it reads no start; with
            ``fit(ckpt_path=FILE)``, of which Lightning says nothing until the model is built, it reads them first
        activation_checkpointing: ``full``: layers keep only their input and recompute the rest for the gradient;
            ``selective``: only feed-forward blocks do; ``none``
        kernels: kernel → implementation, instead of the automatic choice for the device
        compile: whether layers are compiled for training, and for validation within it; ``trainer.compile`` sets it
        frozen: parts that are not trained, by patterns of parameter names: ``attention``, ``layers.0``, ``*.bias``.
            They have no gradient and no optimizer state; a frozen gate keeps its bias

    Raises:
        ConfigError: at ``task.activation_checkpointing`` or ``task.kernels``
    """

    model: Mapping[str, Any]
    optimizer: OptimizerRecipe
    scheduler: Schedule
    seed: Seed = 0
    starts: Sequence[Start] = ()
    parametrisation: Parametrisation = field(default_factory=Standard)
    activation_checkpointing: Recompute = "none"
    kernels: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(choice.KERNELS, choice.AUTO))
    compile: bool = False
    frozen: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_recompute(self.activation_checkpointing)
        choice.check(self.kernels, "task.kernels")

    @property
    def recipe(self) -> OptimizerRecipe:
        """The recipe of the optimizer, with the factors of the parametrisation."""
        return self.optimizer.scaled(self.parametrisation.scales(self.optimizer))

    @property
    def trained(self) -> str | None:
        """The trained model that the run starts from; None for random weights."""
        return next((start.trained for start in self.starts if start.trained is not None), None)
