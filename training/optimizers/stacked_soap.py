"""SOAP for matrices and stacks of matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from blockwright.training.optimizers.closure import evaluated
from blockwright.training.optimizers.distributed import cuts, gradient, local, part_of, placed, whole

RIDGE = 1e-30  # keeps the eigenvectors of a matrix of zeros defined


class StackedSOAP(torch.optim.Optimizer):
    """SOAP (Vyas et al., 2024, arXiv:2409.11321, algorithm 3) of matrices; all but the last two dimensions are stacked.

    For every matrix (a, b), with g its gradient, and Q and P the eigenvectors of L and R::

        m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) (Qᵀ g P)²
        u = Q [ Qᵀ m P / (√v + ε) ] Pᵀ      θ ← θ − lr · c · u − lr · λ · θ
        L ← β₃ L + (1 − β₃) g gᵀ      R ← β₃ R + (1 − β₃) gᵀ g

    with Adam's bias correction c. Every ``frequency`` steps Q and P follow by one step of the power iteration and a QR
    decomposition, their columns in descending order of the eigenvalues, and v in the order of Q and P. As in the
    authors' code the first gradient makes L and R and moves nothing.

    Args:
        params: matrices `(a, b)` and stacks `(…, a, b)`
        lr: learning rate
        betas: β₁, β₂
        shampoo_beta: β₃
        weight_decay: λ
        frequency: steps between two QR decompositions
        max_side: a side longer than this has no L or R, and keeps its own basis
        eps: ε

    Sharded parameters: over a stacked dimension each rank takes its shard. A matrix split over ranks is gathered; its
    L, R, Q, P and v are whole on every rank.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        shampoo_beta: float = 0.95,
        weight_decay: float = 0.1,
        frequency: int = 10,
        max_side: int = 8192,
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "shampoo_beta": shampoo_beta,
            "weight_decay": weight_decay,
            "frequency": frequency,
            "max_side": max_side,
            "eps": eps,
        }
        super().__init__(params, defaults)
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter.ndim < 2 or parameter.is_complex():
                raise ValueError(f"SOAP needs real matrices or stacks of them, not {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)
        return loss

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        own, split, state = local(parameter), cuts(parameter), self.state[parameter]
        g = local(gradient(parameter))
        g = whole(g, parameter) if split else g
        if "step" not in state:
            state |= {name: s if split else placed(s, parameter) for name, s in _started(g, group).items()}
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            return
        state["step"] += 1
        update = _update(g, {name: local(s) for name, s in state.items()}, group)
        own.add_(part_of(update, parameter) if split else update, alpha=-group["lr"])
        own.mul_(1 - group["lr"] * group["weight_decay"])


def _started(g: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The state after the first gradient."""
    state = {"exp_avg": torch.zeros_like(g), "exp_avg_sq": torch.zeros_like(g)}
    for side, products in _products(g, group).items():
        moment = products * (1 - group["shampoo_beta"])
        wide = _wide(moment)
        ridge = RIDGE * torch.eye(moment.shape[-1], dtype=wide.dtype, device=g.device)
        # Numbers that are not finite have no decomposition. The gradient itself then makes the update not finite.
        basis = torch.linalg.eigh((wide + ridge).nan_to_num()).eigenvectors.flip(-1)
        state |= {f"{side}_moment": moment, f"{side}_basis": basis.to(g.dtype).contiguous()}
    return state


def _products(g: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """g gᵀ of the rows and gᵀ g of the columns, where that side is not too long."""
    both = {"row": g, "column": g.mT}
    return {side: x @ x.mT for side, x in both.items() if x.shape[-2] <= group["max_side"]}


def _update(g: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
    """u, with its bias correction; the moments and bases are renewed."""
    (b1, b2), t = group["betas"], state["step"].item()
    m, v = state["exp_avg"].lerp_(g, 1 - b1), state["exp_avg_sq"]
    v.lerp_(_turned(g, state).square(), 1 - b2)
    update = _turned(_turned(m, state) / (v.sqrt() + group["eps"]), state, back=True)
    for side, products in _products(g, group).items():
        state[f"{side}_moment"].lerp_(products, 1 - group["shampoo_beta"])
        if t % group["frequency"] == 0:
            _renew(side, state)
    return update * ((1 - b2**t) ** 0.5 / (1 - b1**t))


def _turned(x: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
    """Qᵀ x P, or Q x Pᵀ."""
    q, p = state.get("row_basis"), state.get("column_basis")
    x = x if q is None else (q if back else q.mT) @ x
    return x if p is None else x @ (p.mT if back else p)


def _wide(x: Tensor) -> Tensor:
    """At least fp32, which the decompositions need."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _renew(side: str, state: dict[str, Tensor]) -> None:
    """One step of the power iteration of a basis, and v in the order of its columns."""
    basis, v = state[f"{side}_basis"], state["exp_avg_sq"]
    products = state[f"{side}_moment"] @ basis
    order = (basis * products).sum(-2).argsort(dim=-1, descending=True, stable=True)
    turned = products.gather(-1, order[..., None, :].expand_as(products))
    basis.copy_(torch.linalg.qr(_wide(turned)).Q)
    index = order[..., :, None] if side == "row" else order[..., None, :]
    v.copy_(v.gather(-2 if side == "row" else -1, index.expand_as(v)))
