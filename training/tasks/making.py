"""Make the decoder that a task trains: composed, sharded, with the weights that training starts from."""

from __future__ import annotations

from typing import Any

from torch import nn

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import initialise_added
from blockwright.training.parallel.build import build
from blockwright.training.parallel.recompute import recompute
from blockwright.training.starts.base import Start
from blockwright.training.tasks.setup import Setup


def whole(setup: Setup, reads: bool, data: Any) -> Decoder:
    """The decoder of one process that has all of it.

    Args:
        setup: of the run; its model complete
        reads: whether it takes the weights to start from; a checkpoint follows otherwise
        data: the data module, whose training text a start may read; None for none
    """
    decoder = compose(setup.model, seed=setup.seed, scales=setup.recipe.scales)
    for start in setup.starts:
        _attach(start, decoder, setup.seed)
        if reads:
            start.fill(decoder, data.train_dataloader if data else list)
    stacks = [layer for block in decoder.inputs.values() for layer in block.stack]
    for layer in [*decoder.layers, *decoder.mtp, *stacks]:
        recompute(layer, setup.activation_checkpointing)
    return decoder


def _attach(start: Start, decoder: Decoder, seed: int) -> None:
    """Attach what a start adds, with initial values."""
    known, model = list(decoder.parameters()), decoder.config
    start.attach(decoder)
    initialise_added(decoder, known, **model["init"], n_layers=model["n_layers"], seed=seed)


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
