"""Tables of memories, spread by rows over all ranks that compute different tokens: no rank gathers a table.

Each rank sends the ids of the rows that its tokens read, each once, to the ranks that hold them, and they send the rows
back; gradients of rows return the same way. What travels grows with the tokens, not with the table: 2·W numbers of each
row that a rank reads, where FSDP2 would gather all of V·W. A gradient is sparse, with this rank's rows at their places
in the whole table; its size is as FSDP2's, a mean over the ranks. Copies of a sharded model (HSDP) share one table.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.nn import functional as F

from blockwright.blocks.memory import Table
from blockwright.training.parallel.collectives import exchange, exchange_counts
from blockwright.training.parallel.local import own_part, own_place


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
