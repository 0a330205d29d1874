"""Refuse a training that the memory at hand cannot hold, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from blockwright.blocks.decoder import Decoder
from blockwright.blocks.kernels.machine import device_memory
from blockwright.blocks.refusals import size
from blockwright.registry import ConfigError
from blockwright.training.configuration.instantiate import instantiate
from blockwright.training.configuration.run import Run
from blockwright.training.configuration.trainer_settings import STRATEGIES
from blockwright.training.entry.start import outline_of
from blockwright.training.parallel.arithmetic import held_bytes
from blockwright.training.parallel.refusals import world_of
from blockwright.training.parallel.sizes import STRATEGY, Sizes, sizes_of
from blockwright.training.processes import is_first
from blockwright.training.starts import options

SURE = 0.05  # share of the memory below which the state of no optimizer matters
HALVED = ("bf16-true", "16-true", "transformer-engine")  # weights of two bytes


def check_room(run: Run) -> None:
    """Refuse a model whose weights, gradients and optimizer state take more memory than there is.

    Activations come on top, so what passes may still be too large. Of a model that is trained
    in part, only the weights count.

    Args:
        run: checked

    Raises:
        ConfigError: with what is needed, and what there is
    """
    trainer = run.trainer
    world = world_of(trainer)
    if not is_first() or not run.train or trainer.get("dry_run") or world is None:
        return  # each child would take memory of the first GPU to ask for its size
    sizes = _sizes(trainer.get("strategy", "auto"), world)
    if sizes is None:
        return
    on_cpu = trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
    there = device_memory(torch.device("cpu" if on_cpu else "cuda"))
    beside = world // trainer.get("num_nodes", 1) if on_cpu else 1  # processes that share it
    model = outline_of(run)
    if 4 * size(model) * beside < SURE * there:
        return
    needed = _needed(model, run, sizes) * beside
    if needed > there:
        each = f"the {beside} processes of this machine need" if beside > 1 else "this process needs"
        rule = (
            f"{each} {needed / 1e9:,.3g} GB for weights, gradients and optimizer state, and there are {there / 1e9:.3g}"
        )
        adapters = [f"train an adapter ({option})" for option in options(lambda start: start.detachable)]
        remedies = ["Shard it over more GPUs (blockwright plan says over how many)", *adapters]
        remedy = f"{', '.join(remedies)}, or choose a smaller model"
        raise ConfigError("model", f"{size(model):.3g} parameters", rule, remedy)


def _sizes(strategy: Any, world: int) -> Sizes | None:
    """How a strategy spreads a model; None for one that others have written, which may shard or offload it."""
    if isinstance(strategy, str):
        return Sizes(replicate=world) if strategy in STRATEGIES else None
    ours = isinstance(strategy, Mapping) and strategy.get("_target_") == STRATEGY
    return sizes_of(strategy, world) if ours and not strategy.get("cpu_offload") else None


def _needed(model: Decoder, run: Run, sizes: Sizes) -> float:
    """Bytes of one process."""
    held = held_bytes(model, sizes, instantiate(run.optimizer, "optimizer"))
    whole = all(p.requires_grad for p in model.parameters())
    return (sum(held.values()) if whole else held["parameters"]) * (
        0.5 if run.trainer.get("precision") in HALVED else 1
    )
