"""Expert parallelism: each rank holds some experts, and tokens are sent to them and back.

A token is sent once to each rank that holds any of its experts, with their indices and weights; that rank returns
their weighted sum. So a gate that restricts a token to M groups of experts, one per rank, restricts it to M copies
(DeepSeek-V2's device-limited routing). The experts are called as usual, with a routing of the received rows to the
local experts: nothing depends on their implementation.

Where the ranks of a tensor group share the experts, all of them have the token already: nothing is sent, and each sums
its own experts' outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from blockwright.blocks.gating.base import Routing
from blockwright.registry import ConfigError
from blockwright.training.parallel.collectives import enter, leave
from blockwright.training.parallel.exchange.base import Exchange
from blockwright.training.parallel.local import distribute, localised
from blockwright.training.parallel.plan import Region


def share_out(region: Region, mesh: DeviceMesh, how: type[Exchange]) -> None:
    """Give each rank of the mesh its experts, and route tokens to them.

    Args:
        region: a block of experts
        mesh: (expert), (tensor) or (expert, tensor)
        how: tokens are sent over the expert mesh
    """
    block: Any = region.block
    n_experts = getattr(block, "n_experts", None)
    if not isinstance(n_experts, int):
        rule = "expert parallelism sets the number of experts on a rank as their attribute n_experts"
        raise ConfigError(f"model: {region.name}", type(block).__name__, rule, "Give the block an attribute n_experts")
    for part in region.parts:
        distribute(part, mesh)
    names = mesh.mesh_dim_names or ()
    over = {name: mesh[name] for name in names}
    here = Whereabouts(n_experts, over.get("expert"), over.get("tensor"))
    exchange = None if here.expert is None else how(here.expert.get_group(), here.ranks, here.held)
    inner, block.n_experts = block.forward, here.held
    # Gradients here are sums over all ranks of the expert mesh. FSDP2 averages over the remaining ranks, but the mean
    # over all of them is needed.
    share = 1 / here.ranks

    def compute(rows: Tensor, experts: Tensor, weights: Tensor, pairs: int) -> Tensor:
        with localised(region.parts, share):
            return _compute(inner, rows, experts, weights, here.held, pairs)

    def forward(x: Tensor, routing: Routing) -> Tensor:
        weights = routing.weights
        group = None if here.tensor is None else here.tensor.get_group()
        if group is not None:
            x, weights = enter(x, group), enter(weights, group)
        y = _dispatch(x, routing.experts, weights, here, exchange, compute)
        return y if group is None else leave(y, group)

    block.forward = forward


class Whereabouts:
    """Which rank holds which expert: contiguous ranges, first over the expert mesh, within it over the tensor mesh.

    Args:
        n_experts: E, on all ranks
        expert: mesh over which tokens are sent; None if not needed
        tensor: mesh whose ranks all have the same tokens
    """

    def __init__(self, n_experts: int, expert: DeviceMesh | None, tensor: DeviceMesh | None) -> None:
        self.n_experts, self.expert, self.tensor = n_experts, expert, tensor
        self.ranks = 1 if expert is None else expert.size()
        self.held = n_experts // self.ranks // (1 if tensor is None else tensor.size())

    def find(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Experts [T,k] → the rank of the expert mesh that holds each (``ranks`` for none), and its index there.

        Experts of other ranks of the tensor group count as none.
        """
        a_rank = self.n_experts // self.ranks
        rank, within = experts // a_rank, experts % a_rank
        if self.tensor is not None:
            rank = rank.masked_fill(within // self.held != self.tensor.get_local_rank(), self.ranks)
        return rank.masked_fill(experts == self.n_experts, self.ranks), within % self.held


def _dispatch(
    x: Tensor, experts: Tensor, weights: Tensor, here: Whereabouts, exchange: Exchange | None, compute: Any
) -> Tensor:
    """x [T,D], experts and weights [T,k] → Σ weight · expert(x) over the experts found by ``here``, [T,D]."""
    rank, number = here.find(experts)
    if exchange is None:
        elsewhere = rank == here.ranks
        return compute(x, number.masked_fill(elsewhere, here.held), weights, rank.numel() - int(elsewhere.sum()))
    rows, asked, shares, pairs, handle = exchange.send(x, rank, number, weights)
    return exchange.give_back(compute(rows, asked, shares, pairs), handle)


def _compute(inner: Any, rows: Tensor, experts: Tensor, weights: Tensor, held: int, pairs: int) -> Tensor:
    """For each row the sum over its entries of ``experts`` [R,k] below ``held``, ``pairs`` in total."""
    nothing = weights.new_zeros(())
    if pairs:
        real = None if pairs == experts.numel() else pairs
        return inner(rows, Routing(experts, weights, nothing, {}, nothing, real))
    # No rows: one row of zeros keeps every rank's graph, and so its collectives, the same.
    rows, weights = (
        torch.cat((rows, rows.new_zeros(1, rows.shape[1]))),
        torch.cat((weights, weights.new_zeros(1, weights.shape[1]))),
    )
    experts = torch.cat((experts, experts.new_zeros(1, experts.shape[1])))
    experts[:-1], experts[-1, 1:] = held, held
    return inner(rows, Routing(experts, weights, nothing, {}, nothing, 1))[:-1]
