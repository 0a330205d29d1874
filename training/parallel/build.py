"""Build a decoder for a parallel run: on the meta device, then part by part, so that no rank ever holds it whole.

Each layer is split by tensor and expert parallelism according to its blocks' plans, and sharded by FSDP2; then each
rank draws its part by the initialisation rule, which gives every tensor the same numbers at any world size. Tables of
memories are spread by rows and never gathered (splits.py). The parts
around the layers come last, with stacks of inputs among them. Only what a block sets itself, and given weights, are
whole on a rank before they are split, one layer at a time, those of an input together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import Shard

from blockwright.blocks.compose import assemble, check
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.gating.base import Gating
from blockwright.blocks.initialise import UNSCALED, draw_part, draws, initialise, suited
from blockwright.blocks.scale import Scale
from blockwright.training.parallel.exchange import AllToAll, Exchange
from blockwright.training.parallel.local import is_low, own_place, plain, regions
from blockwright.training.parallel.meshes import Meshes
from blockwright.training.parallel.recompute import Recompute, recompute
from blockwright.training.parallel.splits import cut, divisible, share_out, spread, tables

LOW = {"bf16-mixed": torch.bfloat16}  # precision of the trainer → dtype of FSDP2's gathered weights
Fill = Callable[..., None]  # (part, prefix=): loads given weights into a part, whose names have this prefix


@dataclass(frozen=True)
class Sharding:
    """Settings of FSDP2.

    Args:
        meshes: of the run
        low: dtype in which weights are gathered and computed with; None: their own
        cpu_offload: whether shards, their gradients and their optimizer state are kept in host memory
        exchange: how tokens are sent to the ranks of their experts
    """

    meshes: Meshes
    low: torch.dtype | None = None
    cpu_offload: bool = False
    exchange: type[Exchange] = AllToAll

    def shard(self, module: nn.Module, *, routed: bool = False, wide: bool = False) -> None:
        """Apply FSDP2 to a module, except its already sharded submodules.

        Args:
            routed: whether it contains this rank's experts
            wide: whether it computes in the dtype of its weights, whatever the others do
        """
        meshes = self.meshes
        mesh = meshes.expert_sharding if routed else meshes.sharding
        low = None if wide else self.low
        precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low or is_low(module) else None)
        options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if self.cpu_offload else {}
        if routed:
            options["shard_placement_fn"] = _beside_experts(mesh.size(-1))
        spread_already: set[Any] = {table.weight for table in tables(module)}
        fully_shard(module, mesh=mesh, mp_policy=precision, ignored_params=spread_already, **options)
        if meshes.device_type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator] # gloo knows sums alone


def build(
    model: Mapping[str, Any],
    seed: int,
    sharding: Sharding,
    how: Recompute = "none",
    fill: Fill | None = None,
    shapes_only: bool = False,
    attach: Callable[[Decoder], None] = lambda decoder: None,
    scales: Mapping[str, Scale] = UNSCALED,
) -> Decoder:
    """Build the decoder of a composition, with its weights distributed over the ranks.

    Args:
        model: a composition
        seed: of the initial weights
        sharding: meshes and FSDP2 settings
        how: activation checkpointing of the layers
        fill: called for each part after the rule, to load given weights
        shapes_only: leave every part on the meta device, split and sharded as usual
        attach: adds parameters, on the meta device
        scales: name of a weight → factors of the run's parametrisation on its initial values
    """
    model = check(model)
    with torch.device("meta"):
        decoder = assemble(model)
        attach(decoder)
    rule = {**model["init"], "n_layers": model["n_layers"], "seed": seed, "scales": scales}

    def materialise(part: nn.Module, prefix: str) -> None:
        """Everything but what each rank draws after splitting."""
        if shapes_only:
            return
        later = set(suited(part)) if fill is None else set()
        part._apply(lambda t: t if t in later else torch.empty_like(t, device="cpu"))
        initialise(part, prefix=prefix, **rule)
        if fill is not None:
            fill(part, prefix=prefix)

    for prefix, part in _stack(decoder):
        materialise(part, prefix)
        _split(part, sharding, model["d_model"])
        recompute(part, how)
        sharding.shard(part)
        if not shapes_only:
            _draw_own(part, sharding, {**rule, "prefix": prefix})
    for prefix, part in decoder.named_children():
        if prefix not in ("layers", "mtp"):
            materialise(part, f"{prefix}.")
    for block in decoder.inputs.values():
        for layer in block.stack:
            _split(layer, sharding, block.stack_width)
            recompute(layer, how)
            sharding.shard(layer)
    sharding.shard(decoder)
    if not shapes_only:
        _draw_own(decoder, sharding, rule)
    # Gather each layer's weights, with those of its experts and gates, while the previous layer computes. By
    # default FSDP2 gathers submodules of a layer when they are reached, and a host that waits for the counts of
    # routed tokens reaches them late. Multi-token prediction is left as is: not every pass uses it.
    groups: list[list[Any]] = [[m for m in layer.modules() if isinstance(m, FSDPModule)] for layer in decoder.layers]
    cast(Any, decoder).set_modules_to_forward_prefetch(groups[0])
    for before, after in itertools.pairwise(groups):
        before[0].set_modules_to_forward_prefetch(after)
        after[0].set_modules_to_backward_prefetch(before)
    # Training calls this, not forward. What it gathers stays until the backward pass: ``nll`` needs the head.
    for method in ("hidden", "last_hidden", "exits"):
        register_fsdp_forward_method(decoder, method)
    return decoder


@torch.no_grad()
def _draw_own(part: nn.Module, sharding: Sharding, rule: Mapping[str, Any]) -> None:
    """Allocate and draw this rank's part of each weight that is still on the meta device."""
    device = "cpu" if sharding.cpu_offload else sharding.meshes.device_type
    missing = [name for name, p in part.named_parameters() if p.is_meta]
    part._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    held = dict(part.named_parameters())  # an adapted parameter reads as another tensor
    own = {id(held[name]) for name in missing}
    for parameter, std, seed in draws(part, **rule):
        if id(parameter) in own:
            draw_part(plain(parameter), parameter.shape, own_place(parameter)[1], std, seed)


def _stack(decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
    for name in ("layers", "mtp"):
        for i, part in enumerate(getattr(decoder, name)):
            yield f"{name}.{i}.", part


def _split(part: nn.Module, sharding: Sharding, width: int) -> None:
    """Split a part by tensor and expert parallelism, and shard separately the blocks that need it."""
    meshes = sharding.meshes
    for table in tables(part):
        spread(table, meshes.data, sharding.low)
    for region in regions(part, dense=meshes.tensor is not None, routed=meshes.expert is not None):
        if region.routed:
            assert meshes.expert is not None
            share_out(region, meshes.expert, sharding.exchange)
            if meshes.routed is not None:
                sharding.shard(region.block, routed=True)
        elif meshes.tensor is not None and divisible(region, meshes.tensor.size(), width):
            cut(region, meshes.tensor)
    if sharding.low is not None:
        for gate in (m for m in part.modules() if isinstance(m, Gating) and list(m.parameters())):
            sharding.shard(gate, wide=True)


def _beside_experts(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """FSDP2 shards a stack's second dimension if possible: the first is that of the experts."""

    def place(parameter: nn.Parameter) -> Shard | None:
        local = plain(parameter)
        return Shard(1) if local.ndim > 1 and local.shape[1] % ranks == 0 else None

    return place
