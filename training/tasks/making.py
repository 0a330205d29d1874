"""Make the decoder that a task trains: composed, sharded, with the weights that training starts from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from blockwright.blocks.checkpoint.source import load_part, load_weights
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import draw_adapters
from blockwright.blocks.ledger import Ledger
from blockwright.registry import ConfigError, plugins
from blockwright.training.checkpoints.resume import say
from blockwright.training.lora import fill
from blockwright.training.parallel.build import build
from blockwright.training.parallel.recompute import recompute
from blockwright.training.tasks.outline import outline
from blockwright.training.tasks.setup import Setup


def whole(setup: Setup, starts: bool, data: Any) -> Decoder:
    """The decoder of one process that has all of it.

    Args:
        setup: of the run; its model complete
        starts: whether it takes the weights to start from; a checkpoint follows otherwise
        data: the data module, whose training text a surgery reads; None for none
    """
    decoder = compose(setup.model, seed=setup.seed)
    if starts and setup.init_from is not None:
        _fill(decoder, setup, Path(setup.init_from), data)
    if starts and setup.tower is not None:
        plugins.offered(plugins.WEIGHTS, "tower", "task.tower")(Path(setup.tower)).load_part(decoder, "")
    if setup.adapter is not None:
        setup.adapter.attach(decoder)
        draw_adapters(decoder, setup.seed)
        fill(decoder, setup.adapter.read(decoder) if starts else {})
    stacks = [layer for block in decoder.inputs.values() for layer in block.stack]
    for layer in [*decoder.layers, *decoder.mtp, *stacks]:
        recompute(layer, setup.activation_checkpointing)
    return decoder


def sharded(setup: Setup, starts: bool, sharding: Any) -> Decoder:
    """A rank's shard of the decoder, built and filled part by part. Arguments are those of ``whole``.

    Args:
        sharding: of the trainer's strategy

    Raises:
        ConfigError: at ``surgery``, which needs whole blocks
    """
    if setup.surgery is not None and setup.init_from is not None and starts:
        rule = "needs whole blocks, and this strategy shards them"
        raise ConfigError("surgery", "default", rule, "Run blockwright surgery first, and start from its OUT")
    adapt = None if setup.adapter is None else setup.adapter.attach
    filler = _filler(setup) if starts else None
    return build(setup.model, setup.seed, sharding, setup.activation_checkpointing, filler, adapt=adapt)


def _fill(decoder: Decoder, setup: Setup, start: Path, data: Any) -> None:
    if setup.surgery is None:
        load_weights(decoder, start)
        return

    def report(old: Decoder, ledger: Ledger) -> None:
        say("\n  ".join([f"surgery on {start}, measured on random tokens:", *ledger.report()]))

    setup.surgery.fill(decoder, start, data.train_dataloader if data else list, setup.seed, report)


def _filler(setup: Setup) -> Callable[..., None] | None:
    """A function that fills a part with the weights to start from; None for random ones."""
    if setup.init_from is None and setup.tower is None:
        return None
    start = None if setup.init_from is None else Path(setup.init_from)
    tower = None if setup.tower is None else plugins.offered(plugins.WEIGHTS, "tower", "task.tower")(Path(setup.tower))
    values = {} if setup.adapter is None else setup.adapter.read(outline(setup.model, setup.adapter, ()))

    def load(part: nn.Module, prefix: str) -> None:
        if start is not None:
            load_part(part, start, prefix)
        if tower is not None:
            tower.load_part(part, prefix)
        fill(part, values, prefix)

    return load
