"""AdamW for parameters that are spread over ranks, in one kernel whatever meshes they lie on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LocalAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, stepped on what each rank holds.

    The step changes each number by itself, so a rank's share of a parameter needs nothing from the others. torch's own
    refuses lists that mix plain tensors and distributed ones, or meshes; parameter by parameter it takes them, at a
    tenth of a millisecond for each operation on each. Parameters and state stay what they are: checkpoints see no
    difference.
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
    """A gradient that lies as its parameter does: one left as partial sums is summed."""
    if not hasattr(gradient, "redistribute") or gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(parameter.device_mesh, parameter.placements)


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, Tensor) and hasattr(tensor, "to_local") else tensor
