"""AdamW for parameters distributed over ranks, in one kernel for any mix of meshes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LocalAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, applied to each rank's local shard.

    The step is elementwise, so a rank's shard needs nothing from the others. torch's own refuses lists that mix plain
    and distributed tensors, or meshes; one parameter at a time works, but takes a tenth of a millisecond per operation.
    Parameters and state keep their types: checkpoints are unchanged.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        outcome = super()._init_group(group, *lists)
        parameters, gradients = lists[:2]
        gradients[:] = [_placed_as(p, g) for p, g in zip(parameters, gradients, strict=True)]
        for tensors in lists:
            if isinstance(tensors, list):
                tensors[:] = [_local(tensor) for tensor in tensors]
        return outcome


def _placed_as(parameter: Any, gradient: Any) -> Any:
    """A gradient placed like its parameter: partial sums are reduced."""
    if not hasattr(gradient, "redistribute") or gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, Tensor) and hasattr(tensor, "to_local") else tensor
