"""Make the decoder that a task trains: composed, sharded, with the weights that training starts from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import initialise_added
from blockwright.blocks.kernels import choice
from blockwright.registry.enforcing import enforced
from blockwright.registry.ranges import Seed
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parallel.build import build
from blockwright.training.parallel.recompute import Recompute, recompute
from blockwright.training.parallel.recompute import check as check_recompute
from blockwright.training.parametrisations import Parametrisation, Standard
from blockwright.training.schedulers import Schedule
from blockwright.training.starts import Start

if TYPE_CHECKING:
    from lightning.pytorch.plugins.precision import Precision

# --- what a run gives to its task beside the objective's own settings -------------------------------------------------


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
        compile: whether layers are compiled for training, and for validation within it; ``auto``: on a GPU that would
            otherwise wait longer than compiling takes. ``trainer.compile`` sets it
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
    compile: Literal["auto"] | bool = "auto"
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


# --- Lightning's low precisions, limited to the dtype of weights, and so of their products ----------------------------


LOW = ("bf16-true", "16-true")


def lower_only_weights(precision: Precision) -> None:
    """Make ``bf16-true`` and ``16-true`` leave batches and the default dtype alone; other precisions do so already.

    Lightning casts every batch, and makes tensors of Python numbers bf16 inside a step. A model needs neither: it reads
    token ids, and has the dtype of its weights. But weights of targets, numbers of bytes, rewards and log-probabilities
    would be rounded to 8 bits, in a step and not in a validation or a rollout of the same run.

    Args:
        precision: the trainer's plug-in, of any strategy; changed in place
    """
    if precision.precision in LOW:
        precision.convert_input = _as_given  # type: ignore[method-assign]
        precision.forward_context = nullcontext  # type: ignore[method-assign]


def _as_given(data: Any) -> Any:
    return data


def whole(setup: Setup, reads: bool, data: Any) -> Decoder:
    """The decoder of one process that has all of it.

    Args:
        setup: of the run; its model complete
        reads: whether it takes the weights to start from; a checkpoint follows otherwise
        data: the data module, whose training text a start may read; None for none
    """
    decoder = compose(setup.model, seed=setup.seed, scales=setup.recipe.scales)
    for start in setup.starts:
        # Attach what a start adds, with initial values
        known, model = list(decoder.parameters()), decoder.config
        start.attach(decoder)
        initialise_added(decoder, known, **model["init"], n_layers=model["n_layers"], seed=setup.seed)
        if reads:
            start.fill(decoder, data.train_dataloader if data else list)
    stacks = [layer for block in decoder.inputs.values() for layer in block.stack]
    for layer in [*decoder.layers, *decoder.mtp, *stacks]:
        recompute(layer, setup.activation_checkpointing)
    return decoder


def sharded(setup: Setup, reads: bool, sharding: Any) -> Decoder:
    """A rank's shard of the decoder, built and filled part by part. Arguments are those of ``whole``.

    Args:
        sharding: of the trainer's strategy

    Raises:
        ConfigError: at a start that needs whole blocks
    """

    def attach(decoder: Decoder) -> None:
        for start in setup.starts:
            start.attach(decoder)
            start.check_sharded(decoder)

    def fill(part: nn.Module, prefix: str) -> None:
        for start in setup.starts:
            start.fill_part(part, prefix)

    filler = fill if reads and setup.starts else None
    settings = (setup.model, setup.seed, sharding, setup.activation_checkpointing, filler)
    return build(*settings, attach=attach, scales=setup.recipe.scales)
