"""Adam for the rows of a table that a batch reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from blockwright.training.optimizers.combined import evaluated
from blockwright.training.optimizers.distributed import gradient, local, placed


class RowAdam(torch.optim.Optimizer):
    """Adam that steps only the rows in a sparse gradient, and lets the moments of the others decay when they are seen.

    Kingma & Ba 2015, arXiv 1412.6980. For a row with the gradient g at step t, last seen at step s, and n = t − s::

        m ← β₁ⁿ m + (1 − β₁) g      v ← β₂ⁿ v + (1 − β₂) g²
        θ ← θ − lr · m̂ / (√v̂ + ε)

    So a row has, whenever it is seen, the moments of the dense rule, whose gradient is 0 in the steps between, and it
    takes the same step. The dense rule also moves a row in those steps, by what is left of its momentum; this one does
    not. `torch.optim.SparseAdam` lets moments decay once for each time that a row is seen, however long that took: rare
    rows keep old ones. A dense gradient holds all rows. No weight decay, as for all tables.

    Args:
        params: tables [V,W]; one of them may be distributed by rows, with a sparse gradient that has the whole table's
            indices and, of the rows, this rank's
        lr: learning rate
        betas: decay rates of the moments per step
        eps: ε
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            never = torch.zeros_like(local(parameter)[:, :1], dtype=torch.float32)
            state["seen"] = placed(never, parameter, (-1,))
        state["step"] += 1
        rows, gradient = _seen(parameter)
        own, m, v, seen = map(local, (parameter, state["exp_avg"], state["exp_avg_sq"], state["seen"]))
        t, (beta1, beta2) = float(state["step"]), group["betas"]
        passed = t - seen[rows]
        mean = m[rows] * beta1**passed + (1 - beta1) * gradient
        square = v[rows] * beta2**passed + (1 - beta2) * gradient.square()
        root = (square / (1 - beta2**t)).sqrt_().add_(group["eps"])
        own[rows] -= group["lr"] / (1 - beta1**t) * mean / root
        m[rows], v[rows], seen[rows] = mean, square, torch.full_like(seen[rows], t)


def _seen(parameter: Tensor) -> tuple[Any, Tensor]:
    """The rows of this rank that are in the gradient, each once, and their gradients."""
    gradient: Any = parameter.grad
    if not gradient.is_sparse:
        return slice(None), local(gradient)
    whole = gradient.coalesce()
    return whole.indices()[0] - _first(parameter), whole.values()


def _first(parameter: Any) -> int:
    """Index in the table of the first row that this rank has."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not hasattr(parameter, "placements"):
        return 0
    mesh, placements = parameter.device_mesh, parameter.placements
    return int(compute_local_shape_and_global_offset(parameter.shape, mesh, placements)[1][0])


# --- AdamW for parameters distributed over ranks, in one kernel for any mix of meshes ---------------------------------


class LocalAdamW(torch.optim.AdamW):
    """`torch.optim.AdamW`, applied to each rank's local shard.

    The step is elementwise, so a rank's shard needs nothing from the others. torch's own refuses lists that mix plain
    and distributed tensors, or meshes; one parameter at a time works, but takes a tenth of a millisecond per operation.
    Parameters and state keep their types: checkpoints are unchanged.
    """

    def _init_group(self, group: dict[str, Any], *lists: Any) -> Any:
        outcome = super()._init_group(group, *lists)
        parameters, gradients = lists[:2]
        gradients[:] = map(gradient, parameters)
        for tensors in lists:
            if isinstance(tensors, list):
                tensors[:] = map(local, tensors)
        return outcome
