"""Blocks whose work ranks share: tensor parallelism, expert parallelism, and tables spread by rows.

**Tensor parallelism.** Each rank runs the same block with fewer heads, or a narrower hidden layer. A block is split at
its border, not at each matrix: its input enters once (its gradient is summed over the ranks), its output leaves once
(summed over the ranks), and everything between uses plain local tensors, including this project's kernels. Blocks that
do not work with a part of their heads stay whole on every rank; ``divisible`` finds out by trying.

Not supported: embeddings and the output head, which stay whole on the ranks of a tensor group (FSDP2 shards them over
the others), and sequence parallelism of norms.

**Expert parallelism.** Each rank holds some experts, and tokens are sent to them and back. A token is sent once to each
rank that holds any of its experts, with their indices and weights; that rank returns their weighted sum. So a gate that
restricts a token to M groups of experts, one per rank, restricts it to M copies (DeepSeek-V2's device-limited routing).
The experts are called as usual, with a routing of the received rows to the local experts: nothing depends on their
implementation. Where the ranks of a tensor group share the experts, all of them have the token already: nothing is
sent, and each sums its own experts' outputs.

**Tables of memories** are spread by rows over all ranks that compute different tokens: no rank gathers a table. Each
rank sends the ids of the rows that its tokens read, each once, to the ranks that hold them, and they send the rows
back; gradients of rows return the same way. What travels grows with the tokens, not with the table: 2·W numbers of each
row that a rank reads, where FSDP2 would gather all of V·W. A gradient is sparse, with this rank's rows at their places
in the whole table; its size is as FSDP2's, a mean over the ranks. Copies of a sharded model (HSDP) share one table.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.nn import functional as F

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.ffn import FFN
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.memory import Table
from blockwright.registry import ConfigError
from blockwright.training.parallel.collectives import enter, exchange, exchange_counts, leave
from blockwright.training.parallel.exchange import Exchange
from blockwright.training.parallel.local import DIMENSION, Region, distribute, localised, own_part, own_place


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


def tables(module: nn.Module) -> Iterator[Table]:
    """All tables in a module."""
    return (m for m in module.modules() if isinstance(m, Table))


def spread(table: Table, mesh: DeviceMesh, low: torch.dtype | None) -> None:
    """Give each rank of a mesh of one dimension its rows, and make the table look up those of other ranks there.

    Args:
        table: whole, on the meta device or equal on all ranks
        low: dtype of the rows that are looked up; None: that of the table
    """
    whole = table.weight
    table.weight = nn.Parameter(own_part(whole.detach(), mesh, [Shard(0)]), whole.requires_grad)

    def forward(ids: Tensor) -> Tensor:
        rows = _looked_up(table.weight, ids, mesh)
        return rows if low is None else rows.to(low)

    table.forward = forward  # type: ignore[method-assign, assignment]


def _looked_up(weight: Any, ids: Tensor, mesh: DeviceMesh) -> Tensor:
    """Rows [...,W] of ids [...]."""
    asked, place = ids.flatten().unique(return_inverse=True)  # sorted, and so by the rank that holds them
    a_rank, ranks, group = -(-len(weight) // mesh.size()), mesh.size(), mesh.get_group()
    counts = torch.bincount(asked // a_rank, minlength=ranks)
    sent, received = torch.stack((counts, exchange_counts(counts, group))).tolist()
    (wanted,) = exchange(received, sent, group, asked)
    local, first = OwnRows.apply(weight), own_place(weight)[1][0]
    held = F.embedding((wanted - first).to(local.device), local, sparse=True).to(ids.device)
    (answers,) = exchange(sent, received, group, held)
    return answers[place].view(*ids.shape, -1)


class OwnRows(torch.autograd.Function):
    """This rank's rows of a table, whose gradient is sparse: DTensor has no sparse tensors."""

    @staticmethod
    def forward(ctx: Any, weight: Any) -> Tensor:
        ctx.shape, ctx.first, ctx.ranks = weight.shape, own_place(weight)[1][0], weight.device_mesh.size()
        local: Tensor = weight._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.coalesce()
        values = own.values() / ctx.ranks
        places = own.indices() + ctx.first
        return torch.sparse_coo_tensor(places, values, ctx.shape, dtype=values.dtype, is_coalesced=True)
