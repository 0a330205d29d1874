"""The process groups of a parallel run, as device meshes."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from blockwright.training.parallel.context import Context
from blockwright.training.parallel.sizes import Sizes


@dataclass(frozen=True)
class Meshes:
    """Device meshes of a run.

    Three grids cover the same ranks. Dense parameters use (replicate, shard, tensor), where ``shard`` has all ranks
    that share the weights; with expert parallelism these are divided again, and expert stacks use (replicate, rest,
    expert, tensor). With context parallelism they are divided into those that read the same windows.

    Args:
        sizes: of the grid
        dense: (replicate, shard, tensor)
        routed: (replicate, rest, expert, tensor); None without expert parallelism
        data: the ranks that compute different tokens, as one dimension
        context: the ranks that share windows; None without context parallelism
    """

    sizes: Sizes
    dense: DeviceMesh
    routed: DeviceMesh | None
    data: DeviceMesh
    context: Context | None = None

    @property
    def device_type(self) -> str:
        return self.dense.device_type

    @property
    def sharding(self) -> DeviceMesh:
        """For FSDP2 of dense parameters: (shard), or (replicate, shard)."""
        return self.dense["replicate", "shard"] if self.sizes.replicate > 1 else self.dense["shard"]

    @property
    def expert_sharding(self) -> DeviceMesh:
        """For FSDP2 of what a rank of the expert mesh holds."""
        if self.routed is None:
            return self.sharding
        return self.routed["replicate", "rest"] if self.sizes.replicate > 1 else self.routed["rest"]

    @property
    def tensor(self) -> DeviceMesh | None:
        return self.dense["tensor"] if self.sizes.tensor > 1 else None

    @property
    def expert(self) -> DeviceMesh | None:
        """For splitting expert stacks: (expert), (tensor) or (expert, tensor)."""
        if self.routed is None:
            return self.tensor
        return self.routed["expert", "tensor"] if self.sizes.tensor > 1 else self.routed["expert"]


def make_meshes(sizes: Sizes, device_type: str) -> Meshes:
    """Create the meshes; the process group must exist."""
    names = ("replicate", "shard", "tensor")
    dense = init_device_mesh(device_type, (sizes.replicate, sizes.sharing, sizes.tensor), mesh_dim_names=names)
    routed = None
    if sizes.expert > 1:
        shape = (sizes.replicate, sizes.sharing // sizes.expert, sizes.expert, sizes.tensor)
        routed = init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "rest", "expert", "tensor"))
    data = dense["replicate", "shard"]._flatten("data") if sizes.replicate > 1 else dense["shard"]
    return Meshes(sizes, dense, routed, data, _context(sizes, device_type))


def _context(sizes: Sizes, device_type: str) -> Context | None:
    if sizes.context == 1:
        return None
    shape = (sizes.data, sizes.context, sizes.tensor)
    windows = init_device_mesh(device_type, shape, mesh_dim_names=("windows", "context", "tensor"))
    return Context(windows.get_group("context"), sizes.context, windows.get_local_rank("context"))
