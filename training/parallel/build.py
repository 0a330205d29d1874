"""A decoder built for a parallel run: on the meta device, then part by part, so that no rank ever holds it whole.

Each layer is cut by tensor and expert parallelism as its blocks' plans say, and handed to FSDP2; then its rank draws
what it holds, by the one rule, which gives every tensor the same numbers at any world size. What stands around the
layers comes last. Only what a block sets itself, and weights that are there already, are whole on a rank before they
are cut, a layer at a time.
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

from blocks.compose import assemble, check
from blocks.decoder import Decoder
from blocks.gating.base import Gating
from blocks.initialise import draws, initialise, suited
from blocks.skipping import draw_part
from training.parallel.experts import share_out
from training.parallel.local import is_low, own_place, plain
from training.parallel.meshes import Meshes
from training.parallel.plan import regions
from training.parallel.recompute import Recompute, recompute
from training.parallel.tensor import cut, divisible

LOW = {"bf16-mixed": torch.bfloat16}  # precision of the trainer → what FSDP2 gathers weights in
Fill = Callable[..., None]  # (part, prefix=): gives a part other weights, by the prefix of its names


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 treats what it is given.

    Args:
        meshes: of the run
        low: dtype that weights are gathered in and computed with; None: their own
        cpu_offload: whether shards, their gradients and their optimizer state lie in the host's memory
    """

    meshes: Meshes
    low: torch.dtype | None = None
    cpu_offload: bool = False

    def shard(self, module: nn.Module, *, routed: bool = False, wide: bool = False) -> None:
        """Hand a module to FSDP2, less what inside it was handed over before.

        Args:
            routed: whether it holds the experts of this rank
            wide: whether it computes in the dtype of its weights whatever the rest does
        """
        meshes = self.meshes
        mesh = meshes.expert_sharding if routed else meshes.sharding
        low = None if wide else self.low
        precision = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32 if low or is_low(module) else None)
        options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if self.cpu_offload else {}
        if routed:
            options["shard_placement_fn"] = _beside_experts(mesh.size(-1))
        fully_shard(module, mesh=mesh, mp_policy=precision, **options)
        if meshes.device_type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # type: ignore[operator] # gloo knows sums alone


def build(
    model: Mapping[str, Any],
    seed: int,
    sharding: Sharding,
    how: Recompute = "none",
    fill: Fill | None = None,
    shapes_only: bool = False,
) -> Decoder:
    """The decoder of a composition, its weights spread over the ranks.

    Args:
        model: a composition
        seed: of the initial weights
        sharding: over whom, and how
        how: activation checkpointing of the layers
        fill: called for each part after the rule, to give it weights that are there already
        shapes_only: leave every part on the meta device, cut and sharded as it would be
    """
    model = check(model)
    with torch.device("meta"):
        decoder = assemble(model)
    rule = {**model["init"], "n_layers": model["n_layers"], "seed": seed}

    def materialise(part: nn.Module, prefix: str) -> None:
        """All but what each rank draws for itself once it is cut."""
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
    sharding.shard(decoder)
    if not shapes_only:
        _draw_own(decoder, sharding, rule)
    _fetch_ahead(decoder)
    # Training calls this and not forward. What it gathers stays until the backward pass: ``nll`` needs the head.
    register_fsdp_forward_method(decoder, "hidden")
    return decoder


@torch.no_grad()
def _draw_own(part: nn.Module, sharding: Sharding, rule: Mapping[str, Any]) -> None:
    """Give this rank's part of each weight that is still on the meta device its memory and its numbers."""
    device = "cpu" if sharding.cpu_offload else sharding.meshes.device_type
    missing = [name for name, p in part.named_parameters() if p.is_meta]
    part._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    own = {id(part.get_parameter(name)) for name in missing}
    for parameter, std, seed in draws(part, **rule):
        if id(parameter) in own:
            draw_part(plain(parameter), parameter.shape, own_place(parameter)[1], std, seed)


def _fetch_ahead(decoder: Decoder) -> None:
    """Gather each layer's weights, those of its experts and gates too, while the layer before it computes.

    FSDP2 by itself gathers what lies inside a layer when it is reached, and a host that waits for the numbers of routed
    tokens reaches it late. Depths of multi-token prediction are left to that: not every pass comes to them.
    """
    groups: list[list[Any]] = [[m for m in layer.modules() if isinstance(m, FSDPModule)] for layer in decoder.layers]
    cast(Any, decoder).set_modules_to_forward_prefetch(groups[0])
    for before, after in itertools.pairwise(groups):
        before[0].set_modules_to_forward_prefetch(after)
        after[0].set_modules_to_backward_prefetch(before)


def _stack(decoder: Decoder) -> Iterator[tuple[str, nn.Module]]:
    for name in ("layers", "mtp"):
        for i, part in enumerate(getattr(decoder, name)):
            yield f"{name}.{i}.", part


def _split(part: nn.Module, sharding: Sharding, d_model: int) -> None:
    """Cut a part by tensor and expert parallelism, and shard on their own the blocks that have to be."""
    meshes = sharding.meshes
    for region in regions(part, dense=meshes.tensor is not None, routed=meshes.expert is not None):
        if region.routed:
            assert meshes.expert is not None
            share_out(region, meshes.expert)
            if meshes.routed is not None:
                sharding.shard(region.block, routed=True)
        elif meshes.tensor is not None and divisible(region, meshes.tensor.size(), d_model):
            cut(region, meshes.tensor)
    if sharding.low is not None:
        for gate in (m for m in part.modules() if isinstance(m, Gating) and list(m.parameters())):
            sharding.shard(gate, wide=True)


def _beside_experts(ranks: int) -> Callable[[nn.Parameter], Shard | None]:
    """FSDP2 cuts a stack's second dimension where it can: the first is that of the experts."""

    def place(parameter: nn.Parameter) -> Shard | None:
        local = plain(parameter)
        return Shard(1) if local.ndim > 1 and local.shape[1] % ranks == 0 else None

    return place
