"""Tensor parallelism: each rank runs the same block with fewer heads, or a narrower hidden layer.

A block is split at its border, not at each matrix: its input enters once (its gradient is summed over the ranks), its
output leaves once (summed over the ranks), and everything between uses plain local tensors, including this project's
kernels. Blocks that do not work with a part of their heads stay whole on every rank; ``divisible`` finds out by trying.

Not supported: embeddings and the output head, which stay whole on the ranks of a tensor group (FSDP2 shards them over
the others), and sequence parallelism of norms.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.ffn import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.training.parallel.collectives import enter, leave
from blockwright.training.parallel.local import distribute, localised
from blockwright.training.parallel.plan import DIMENSION, Region


def cut(region: Region, mesh: DeviceMesh) -> None:
    """Give each rank of the mesh its part of a region's parameters, and make it compute with that."""
    for part in region.parts:
        distribute(part, mesh)
    inner, group = region.block.forward, mesh.get_group()

    def forward(x: Tensor, *arguments: Any, **options: Any) -> Any:
        with localised(region.parts):
            out = inner(enter(x, group), *arguments, **options)
        for name, loss in (options.get("losses") or {}).items():
            options["losses"][name] = leave(loss, group)  # of this rank's heads
        if isinstance(out, tuple):
            return leave(out[0], group), *out[1:]
        return leave(out, group)

    region.block.forward = forward


def divisible(region: Region, ranks: int, width: int) -> bool:
    """Whether the block works with a part of its parameters: tried with shapes only, on the meta device.

    A block with per-head values outside its parameters (slopes of ALiBi, a decay) does not, nor does a norm over all
    heads.
    """
    if any(_indivisible(part.parameter, DIMENSION.get(part.placement), ranks) for part in region.parts):
        return False
    trial = narrowed(region, ranks)
    x = torch.empty(1, 4, width, device="meta", dtype=torch.float32)
    try:
        with torch.no_grad():
            out = trial(x, *_second_argument(trial))
    except (RuntimeError, ValueError, IndexError):
        return False
    return (out[0] if isinstance(out, tuple) else out).shape == x.shape


def narrowed(region: Region, ranks: int) -> Any:
    """The block that a rank computes with, on the meta device."""
    block = copy.deepcopy(region.block, {}).to("meta")
    for (name, _), part in zip(list(block.named_parameters()), region.parts, strict=True):
        path, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(path), leaf, nn.Parameter(_first(part.parameter, part.placement, ranks)))
    return block


def _second_argument(block: nn.Module) -> list[Pass | Tensor]:
    """The argument after x: a pass, or the ids of the tokens for a gate."""
    ids = torch.arange(4, device="meta")[None]
    if isinstance(block, (Attention, FFN)):
        return [Pass(ids, tokens=ids)]
    return [ids] if len(inspect.signature(block.forward).parameters) > 1 else []


def _indivisible(parameter: Tensor, dimension: int | None, ranks: int) -> bool:
    return dimension is not None and parameter.shape[dimension] % ranks != 0


def _first(parameter: Tensor, placement: str, ranks: int) -> Tensor:
    if placement not in DIMENSION:
        return torch.empty_like(parameter, device="meta")
    dimension = DIMENSION[placement]
    shape = list(parameter.shape)
    shape[dimension] //= ranks
    return torch.empty(shape, dtype=parameter.dtype, device="meta")
