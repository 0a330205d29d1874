"""The cost of a parallel plan for each rank, before it runs: numbers held, and bytes communicated per step.

Bytes of a collective are those of its full buffer on one rank: the output of an all-gather or all-to-all, the input of
a reduce-scatter, the buffer of an all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockwright.blocks.cost import numbers_read
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.initialise import weights
from blockwright.blocks.memory import Table
from blockwright.blocks.sample import alike
from blockwright.training.optimizers.recipe import OptimizerRecipe
from blockwright.training.parallel.local import DIMENSION, Region, regions
from blockwright.training.parallel.remembered import appended
from blockwright.training.parallel.sizes import Sizes
from blockwright.training.parallel.splits import divisible, narrowed


@dataclass(frozen=True)
class Holding:
    """How one parameter is distributed.

    name: one of its names; the first of equal layers represents all
    group: FSDP2's unit of gathering: a layer, the experts of a layer, or the root
    shape: of what a rank computes with, before FSDP2 shards it
    routed: whether it belongs to experts
    table: whether it is a table of a memory, whose rows are spread over all ranks that compute different tokens
    times: number of the decoder's parameters it represents
    visits: of their layers in a pass, each of which gathers them
    """

    name: str
    group: str
    shape: tuple[int, ...]
    routed: bool
    times: int
    visits: int
    table: bool = False

    @property
    def gathered(self) -> int:
        """Numbers that a rank computes with."""
        return math.prod(self.shape)

    def held(self, sizes: Sizes) -> int:
        """Numbers of each that the rank with most keeps: FSDP2 spreads whole rows, and so leaves some ranks none."""
        if self.table:
            return math.ceil(self.shape[0] / (sizes.replicate * sizes.sharing)) * self.shape[1]
        shards, shape = self.shards(sizes), self.shape or (1,)
        columns = self.apart(sizes) and len(shape) > 1 and shape[1] % shards == 0  # as build.py places experts
        length = shape[1 if columns else 0]
        return math.ceil(length / shards) * (self.gathered // length)

    def apart(self, sizes: Sizes) -> bool:
        """Whether FSDP2 spreads it over the ranks that hold the same experts."""
        return self.routed and sizes.expert > 1

    def shards(self, sizes: Sizes) -> int:
        """Number of ranks over which FSDP2 shards it."""
        return sizes.sharing // sizes.expert if self.apart(sizes) else sizes.sharing


@dataclass(frozen=True)
class Crossing:
    """A block whose input and output are communicated.

    names: of all the blocks it represents, once for each visit
    routed: whether it is a stack of experts
    top_k: of its gate
    slots: of those, the maximum on one rank
    replicated: numbers of parameters held by every rank of a tensor group
    """

    names: tuple[str, ...]
    routed: bool
    top_k: int
    slots: int
    replicated: int


def holdings(decoder: Decoder, sizes: Sizes) -> list[Holding]:
    """The distribution of every parameter of a decoder, possibly on the meta device; equal layers are examined once."""
    probe, groups = _distinct(decoder)
    cut = {
        id(part.parameter): (part.placement, region) for region in _split_regions(probe, sizes) for part in region.parts
    }
    tables = {id(module.weight) for module in probe.modules() if isinstance(module, Table)}
    found = []
    for name, parameter in probe.named_parameters():
        placement, region = cut.get(id(parameter), ("replicate", None))
        routed = placement == "expert"
        shape = list(parameter.shape)
        if placement in DIMENSION:
            shape[DIMENSION[placement]] //= sizes.expert * sizes.tensor if routed else sizes.tensor
        group = ".".join(name.split(".")[:2]) if name.startswith(("layers.", "mtp.")) else "root"
        group = f"{region.name}" if routed and sizes.expert > 1 and region else group
        layers = groups[int(name.split(".")[1])] if name.startswith("layers.") else None
        counts = (1, 1) if layers is None else (len(layers), decoder.visits(layers))
        found.append(Holding(name, group, tuple(shape), routed, *counts, id(parameter) in tables))
    return found


def crossings(decoder: Decoder, sizes: Sizes) -> list[Crossing]:
    """The blocks that tensor or expert parallelism splits; the first of equal layers represents all."""
    probe, groups = _distinct(decoder)
    gates = {name.rpartition(".")[0]: m for name, m in probe.named_modules() if isinstance(m, Gating)}
    found = []
    for region in _split_regions(probe, sizes):
        top_k, names = _top_k(region, gates), [region.name]
        if region.name.startswith("layers."):
            _, index, rest = region.name.split(".", 2)
            names = [f"layers.{i}.{rest}" for i in groups[int(index)] for _ in range(decoder.visits([i]))]
        slots = min(top_k, region.parts[0].parameter.shape[0] // (sizes.expert * sizes.tensor)) if region.routed else 0
        replicated = sum(p.parameter.numel() for p in region.parts if p.placement == "replicate")
        found.append(Crossing(tuple(names), region.routed, top_k, slots, replicated))
    return found


def _distinct(decoder: Decoder) -> tuple[Decoder, list[list[int]]]:
    """The decoder with one of each of its distinct layers, and the layers each represents."""
    groups = alike(decoder.layers)
    return decoder.with_layers(decoder.layers[group[0]] for group in groups), groups


def _split_regions(decoder: Decoder, sizes: Sizes) -> list[Region]:
    found = regions(decoder, dense=sizes.tensor > 1, routed=sizes.tensor * sizes.expert > 1)
    return [r for r in found if r.routed or divisible(r, sizes.tensor, _width(decoder, r))]


def _width(decoder: Decoder, region: Region) -> int:
    """Of a region's input."""
    for block in decoder.inputs.values():
        if any(region.block is module for layer in block.stack for module in layer.modules()):
            return block.stack_width
    return decoder.config["d_model"]


def whole_regions(decoder: Decoder, sizes: Sizes) -> list[str]:
    """Names of the blocks that tensor parallelism cannot split: every rank of a group computes them whole."""
    found = regions(decoder, routed=False) if sizes.tensor > 1 else []
    return [r.name for r in found if not divisible(r, sizes.tensor, _width(decoder, r))]


def held_bytes(decoder: Decoder, sizes: Sizes, recipe: OptimizerRecipe) -> dict[str, int]:
    """Bytes that a rank keeps between steps: fp32 parameters and gradients, and the optimizer's state.

    Args:
        decoder: on the meta device
        sizes: of the run
        recipe: of the optimizer; its state is counted in a step on the meta device
    """
    spread, factors = holdings(decoder, sizes), state_factors(decoder, recipe)
    numbers = sum(h.held(sizes) * h.times for h in spread)
    state = sum((h.held(sizes) * factors[h.name][0] + h.gathered * factors[h.name][1]) * h.times for h in spread)
    return {"parameters": 4 * numbers, "gradients": 4 * numbers, "optimizer": round(4 * state)}


def state_factors(decoder: Decoder, recipe: OptimizerRecipe) -> dict[str, tuple[float, float]]:
    """Name of each ``Holding`` → numbers of optimizer state per number, spread as the weight is, and whole on each
    rank."""
    probe, _ = _distinct(decoder)
    optimizer = recipe.build(probe)
    for parameter in probe.parameters():
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    whole = {weight.parameter for weight in weights(probe) if not recipe.spreads_state(weight)}
    factors = {}
    for name, parameter in probe.named_parameters():
        factor = sum(v.numel() for v in optimizer.state[parameter].values() if v.ndim) / parameter.numel()
        factors[name], parameter.grad = (0.0, factor) if parameter in whole else (factor, 0.0), None
    return factors


def traffic(decoder: Decoder, sizes: Sizes, tokens: int, copies: Mapping[str, float] | float = 0.0) -> dict[str, float]:
    """Bytes of each collective on a rank for one training step of one micro-batch, in fp32.

    Weights are gathered for the forward pass and, except the root's, again for the backward pass; gradients are
    scattered once. Each split block sums its output in the forward pass and its input's gradient in the backward pass;
    gradients of parameters replicated within a split block are summed too. Copies of a token are sent to the experts
    and back, and so are their gradients. Rows of tables are sent to the ranks that read them, their gradients back.
    With context parallelism what attentions cache is gathered, and its gradient scattered, of all tokens of the
    windows. Scalars, counts and metrics are left out.

    Args:
        decoder: on the meta device
        sizes: of the run
        tokens: of the micro-batch on a rank
        copies: mean of the rows that a rank sends and receives for a layer, by the name of its experts; or one number
            for all
    """
    weights = weight_numbers(holdings(decoder, sizes), sizes)
    states = token_numbers(crossings(decoder, sizes), sizes, decoder.config["d_model"], tokens, copies)
    if sizes.replicate * sizes.sharing > 1:
        states["all_to_all"] += 2 * tokens * read(decoder)
    if sizes.context > 1:  # what attentions cache of all tokens of the windows is gathered, its gradient scattered
        for kind in ("all_gather", "reduce_scatter"):
            states[kind] += remembered(decoder, sizes) * tokens * sizes.context
    return {kind: 4 * (weights[kind] + states[kind]) for kind in COLLECTIVES}


def read(decoder: Decoder) -> int:
    """Numbers that a token reads of all tables: at most what is sent for it, as rows that several read travel once."""
    probe, groups = _distinct(decoder)
    return sum(len(group) * numbers_read(probe.layers[i], probe) for i, group in enumerate(groups))


def remembered(decoder: Decoder, sizes: Sizes) -> int:
    """Numbers of a token that all attentions of a rank cache, multi-token prediction's included."""
    probe, groups = _distinct(decoder)
    width, cut = decoder.config["d_model"], {}
    if sizes.tensor > 1:
        cut = {id(region.block): region for region in _split_regions(probe, sizes)}
    layers: list[tuple[int, Any]] = [(decoder.visits(group), probe.layers[i]) for i, group in enumerate(groups)]
    total = 0
    for times, layer in [*layers, *((1, depth.layer) for depth in probe.mtp)]:
        attention = layer.attention
        region = cut.get(id(attention))
        total += times * appended(attention if region is None else narrowed(region, sizes.tensor), width).numbers
    return total


COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")


def weight_numbers(spread: Iterable[Holding], sizes: Sizes) -> dict[str, float]:
    """Collective → numbers of weights and gradients communicated per micro-batch, as in ``traffic``."""
    total = dict.fromkeys(COLLECTIVES, 0.0)
    for h in (h for h in spread if not h.table):
        if h.shards(sizes) > 1:
            total["all_gather"] += h.visits * h.gathered * (1 if h.group == "root" else 2)
            total["reduce_scatter"] += h.visits * h.gathered
        if sizes.replicate > 1:
            total["all_reduce"] += h.times * h.held(sizes)
    return total


def token_numbers(
    crossed: Sequence[Crossing], sizes: Sizes, d_model: int, tokens: float, copies: Mapping[str, float] | float = 0.0
) -> dict[str, float]:
    """Collective → numbers of hidden states and gradients communicated per micro-batch, as in ``traffic``."""
    total = dict.fromkeys(COLLECTIVES, 0.0)
    for c in crossed:
        if sizes.tensor > 1:
            a_token = 2 * d_model + (c.top_k if c.routed else 0)
            total["all_reduce"] += len(c.names) * (tokens * a_token + c.replicated)
        if c.routed and sizes.expert > 1:
            rows = sum(copies.get(n, 0.0) for n in c.names) if isinstance(copies, Mapping) else copies * len(c.names)
            total["all_to_all"] += rows * (4 * d_model + 4 * c.slots)
    return total


def _top_k(region: Region, gates: Mapping[str, nn.Module]) -> int:
    gate = gates.get(region.name.rpartition(".")[0])
    return int(getattr(gate, "top_k", 0))
