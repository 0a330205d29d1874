"""What a run gives to its task beside the objective's own settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockwright.blocks.kernels import choice
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Seed
from blockwright.training.lora import Lora
from blockwright.training.optimizers.base import OptimizerRecipe
from blockwright.training.parallel.recompute import Recompute
from blockwright.training.parallel.recompute import check as check_recompute
from blockwright.training.schedulers.base import Schedule
from blockwright.training.surgery import Surgery

# Of the run, from the root of its configuration; the other fields of ``Setup`` are settings of ``task``.
CONTEXT = ("model", "optimizer", "scheduler", "seed", "init_from", "adapter", "surgery")


@enforced("task")
@dataclass(frozen=True)
class Setup:
    """The model of a run and how it is trained, whatever the objective.

    Args:
        model: composition of the decoder, as plain types (the ``model`` node)
        optimizer: recipe of the optimizer
        scheduler: factor on the learning rate over the steps
        seed: of the initial weights and all random draws of training
        init_from: a run's folder, a checkpoint or an imported folder to take the initial weights from; null for random
            ones. A resumed run takes those of its checkpoint. With ``trainer.ckpt_path = FILE`` before ``fit`` it reads
            neither this nor ``tower`` nor the adapter's start; with ``fit(ckpt_path=FILE)``, of which Lightning says
            nothing until the model is built, it reads them first
        adapter: trains low-rank updates of a frozen model; null trains the model itself
        surgery: how weights of another composition are put into this model; null: they must fit
        activation_checkpointing: ``full``: layers keep only their input and recompute the rest for the gradient;
            ``selective``: only feed-forward blocks do; ``none``
        kernels: kernel → implementation, instead of the automatic choice for the device
        compile: whether layers are compiled for training, and for validation within it; ``trainer.compile`` sets it
        frozen: parts that are not trained, by patterns of parameter names: ``attention``, ``layers.0``, ``*.bias``.
            They have no gradient and no optimizer state; a frozen gate keeps its bias
        tower: folder of another library's checkpoint, from which the tower of an input starts, after
            ``init_from``; null for none

    Raises:
        ConfigError: at ``task.activation_checkpointing`` or ``task.kernels``
    """

    model: Mapping[str, Any]
    optimizer: OptimizerRecipe
    scheduler: Schedule
    seed: Seed = 0
    init_from: str | None = None
    adapter: Lora | None = None
    surgery: Surgery | None = None
    activation_checkpointing: Recompute = "none"
    kernels: Mapping[str, str] = field(default_factory=lambda: dict.fromkeys(choice.KERNELS, choice.AUTO))
    compile: bool = False
    frozen: Sequence[str] = ()
    tower: str | None = None

    def __post_init__(self) -> None:
        check_recompute(self.activation_checkpointing)
        choice.check(self.kernels, "task.kernels")
