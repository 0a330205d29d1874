"""What a plan costs each rank before it runs: numbers held, and bytes that travel in a step.

Bytes of a collective are those of its full buffer on one rank: what an all-gather or an all-to-all puts out, what a
reduce-scatter takes in, what an all-reduce goes over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from blocks.decoder import Decoder
from blocks.gating.base import Gating
from training.optimizers.base import OptimizerRecipe
from training.parallel.plan import Region, regions
from training.parallel.sizes import Sizes
from training.parallel.tensor import divisible


@dataclass(frozen=True)
class Holding:
    """How one parameter is spread: ``gathered`` numbers are computed with on a rank, ``held`` of them kept there.

    group: what FSDP2 gathers it with: a layer, the experts of a layer, or the root
    routed: whether it belongs to experts
    """

    name: str
    group: str
    gathered: int
    held: int
    routed: bool


def holdings(decoder: Decoder, sizes: Sizes) -> list[Holding]:
    """The spread of every parameter of a decoder, which may lie on the meta device."""
    cut = {
        id(part.parameter): (part.placement, region)
        for region in _split_regions(decoder, sizes)
        for part in region.parts
    }
    found = []
    for name, parameter in decoder.named_parameters():
        placement, region = cut.get(id(parameter), ("replicate", None))
        routed = placement == "expert"
        apart = routed and sizes.expert > 1
        ranks = sizes.expert * sizes.tensor if routed else sizes.tensor if placement in ("column", "row") else 1
        shards = sizes.shard // sizes.expert if apart else sizes.shard
        group = ".".join(name.split(".")[:2]) if name.startswith(("layers.", "mtp.")) else "root"
        gathered = parameter.numel() // ranks
        group = f"{region.name}" if apart and region else group
        found.append(Holding(name, group, gathered, math.ceil(gathered / shards), routed))
    return found


def _split_regions(decoder: Decoder, sizes: Sizes) -> list[Region]:
    width = decoder.config["d_model"]
    found = regions(decoder, dense=sizes.tensor > 1, routed=sizes.tensor * sizes.expert > 1)
    return [r for r in found if r.routed or divisible(r, sizes.tensor, width)]


def whole_regions(decoder: Decoder, sizes: Sizes) -> list[str]:
    """Names of the blocks that tensor parallelism would split and cannot: every rank of a group computes them whole."""
    found = regions(decoder, routed=False) if sizes.tensor > 1 else []
    return [r.name for r in found if not divisible(r, sizes.tensor, decoder.config["d_model"])]


def held_bytes(decoder: Decoder, sizes: Sizes, recipe: OptimizerRecipe) -> dict[str, int]:
    """Bytes that a rank keeps between steps: fp32 parameters and gradients, and what the optimizer adds.

    Args:
        decoder: on the meta device
        sizes: of the run
        recipe: of the optimizer; its state is counted in a step on the meta device
    """
    spread = {holding.name: holding for holding in holdings(decoder, sizes)}
    numbers = sum(h.held for h in spread.values())
    state = 0.0
    for name, factor in _state_factors(decoder, recipe).items():
        state += spread[name].held * factor
    return {"parameters": 4 * numbers, "gradients": 4 * numbers, "optimizer": round(4 * state)}


def _state_factors(decoder: Decoder, recipe: OptimizerRecipe) -> dict[str, float]:
    """Parameter → numbers that the optimizer keeps for each of its own."""
    optimizer = recipe.build(decoder)
    for parameter in decoder.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    factors = {}
    for name, parameter in decoder.named_parameters():
        alike = [v for v in optimizer.state[parameter].values() if getattr(v, "shape", None) == parameter.shape]
        factors[name], parameter.grad = float(len(alike)), None
    return factors


def traffic(decoder: Decoder, sizes: Sizes, tokens: int, copies: Mapping[str, float] | float = 0.0) -> dict[str, float]:
    """Bytes of each collective that one training step of one micro-batch puts through a rank, in fp32.

    Weights are gathered for the forward pass and, but for the root's, once more for the backward pass; gradients are
    scattered once. Each split block sums its output in the forward pass and its input's gradient in the backward
    pass; the gradients of parameters that all ranks of a split block hold are summed too. Copies of a token travel to
    the experts and back, and so do their gradients. Scalars, counts and metrics are left out.

    Args:
        decoder: on the meta device
        sizes: of the run
        tokens: of the micro-batch on a rank
        copies: rows that a rank sends and receives (their mean) for a layer, by the name of its experts; or one number
            for all
    """
    spread, width = holdings(decoder, sizes), decoder.config["d_model"]
    total = dict.fromkeys(("all_gather", "reduce_scatter", "all_reduce", "all_to_all"), 0.0)
    for h in spread:
        apart = h.routed and sizes.expert > 1
        if (sizes.shard // sizes.expert if apart else sizes.shard) > 1:
            total["all_gather"] += 4 * h.gathered * (1 if h.group == "root" else 2)
            total["reduce_scatter"] += 4 * h.gathered
        if sizes.replicate > 1:
            total["all_reduce"] += 4 * h.held
    gates = {name.rpartition(".")[0]: m for name, m in decoder.named_modules() if isinstance(m, Gating)}
    for region in _split_regions(decoder, sizes):
        top_k = _top_k(region, gates)
        if sizes.tensor > 1:
            total["all_reduce"] += 4 * tokens * (2 * width + (top_k if region.routed else 0))
            total["all_reduce"] += 4 * sum(p.parameter.numel() for p in region.parts if p.placement == "replicate")
        if region.routed and sizes.expert > 1:
            slots = min(top_k, region.parts[0].parameter.shape[0] // (sizes.expert * sizes.tensor))
            rows = copies.get(region.name, 0.0) if isinstance(copies, Mapping) else copies
            total["all_to_all"] += 4 * rows * (4 * width + 4 * slots)
    return total


def _top_k(region: Region, gates: Mapping[str, nn.Module]) -> int:
    gate = gates.get(region.name.rpartition(".")[0])
    return int(getattr(gate, "top_k", 0))
