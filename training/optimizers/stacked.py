"""Muon, NorMuon and SOAP for matrices and stacks of matrices."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blockwright.training.optimizers.combined import evaluated
from blockwright.training.optimizers.distributed import cuts, gradient, local, part_of, placed, whole

# --- Muon for matrices and stacks of matrices, batched ----------------------------------------------------------------


COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steepest at zero, so few iterations suffice
NORM_FLOOR = 1e-7  # keeps a gradient of zeros at zero

# Elements orthogonalised at once. On CPU about what fits in one core's cache between the products of an iteration;
# elsewhere enough to fill the device, and a bound on the memory of the temporaries.
CPU_ELEMENTS = 2**18
DEVICE_ELEMENTS = 2**26


class StackedMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for parameters of two dimensions and more; all but the last two are stacked.

    For every matrix, with g its gradient, μ the momentum and NS the Newton–Schulz iteration (`orthogonalize`)::

        m ← μ m + (1 − μ) g      u = (1 − μ) g + μ m      θ ← θ − lr · λ · θ − lr · scale(θ) · NS(u)

    Args:
        params: matrices `(a, b)` and stacks `(…, a, b)`; matrices of equal shape, transposed or not, share a product
        lr: learning rate
        weight_decay: λ
        momentum: μ
        ns_steps: iterations of NS
        adjust_lr_fn: scale(θ): `original`, √max(1, a/b), b the input side; `match_rms_adamw`,
            0.2 · √max(a, b), which gives the update the size of AdamW's so that its lr and λ carry over
        ns_dtype: dtype of NS: `float32`, `bfloat16`, or `auto`, bfloat16 except on CPUs without bf16 units, where a
            bf16 product takes about twice as long as one in float32

    How this differs from `torch.optim.Muon`: that one refuses stacks, takes one matrix at a time and always computes
    in bfloat16. `original` takes a/b from the stored shape: a stack stored `(E, in, out)` gets in/out where a
    Linear's `(out, in)` gets out/in. Fused projections (`[q; k; v]` in one matrix) are orthogonalised as one.

    Sharded parameters: over a stacked dimension (expert parallelism) each rank orthogonalises its shard; a matrix
    split over ranks is gathered, orthogonalised on every rank, and split again.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        ns_dtype: str = "auto",
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.ndim < 2 or parameter.is_complex():
                    raise ValueError(f"Muon needs real matrices or stacks of them, not {tuple(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = evaluated(closure)
        for group in self.param_groups:
            pieces: list[Piece] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state |= self.started(parameter)
                if cuts(parameter):
                    self._step_gathered(parameter, state, group)
                else:
                    pieces += self.pieces(parameter, state, group)
            for batch in _batches(pieces):
                self._step_batch(batch, group)
        return loss

    def started(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        return {"momentum_buffer": torch.zeros_like(parameter)}

    def pieces(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[Piece]:
        """The matrices of a parameter that are orthogonalised apart."""
        own, grad, momentum = local(parameter), local(gradient(parameter)), local(state["momentum_buffer"])
        piece = _turned(own, grad, momentum, local(state.get("second_moment")), group)
        return [piece]

    def weighed(self, update: Tensor, pieces: Sequence[Piece], group: dict[str, Any]) -> Tensor:
        """Orthogonalised matrices [S,a,b] of these pieces, in order → what the weights move by, but for the rate."""
        return update

    def _step_batch(self, batch: list[Piece], group: dict[str, Any]) -> None:
        """One step on pieces of equal size."""
        updates = _nesterov([piece.gradient for piece in batch], [piece.momentum for piece in batch], group["momentum"])
        update = self.weighed(_orthogonalized(torch.cat(updates), group), batch, group)
        torch._foreach_mul_([piece.parameter for piece in batch], 1 - group["lr"] * group["weight_decay"])
        for piece, part in zip(batch, update.split([len(piece.parameter) for piece in batch]), strict=True):
            piece.parameter.add_(part, alpha=-group["lr"] * piece.scale)

    def _step_gathered(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step on a DTensor whose matrices are split over several ranks; each computes all of it."""
        (update,) = _nesterov([local(gradient(parameter))], [local(state["momentum_buffer"])], group["momentum"])
        gathered = whole(update, parameter)
        piece = _turned(gathered, gathered, gathered, state.get("second_moment"), group)
        update = self.weighed(_orthogonalized(piece.gradient, group), [piece], group)
        update = (update.mT if piece.turned else update).reshape(parameter.shape)
        own = local(parameter)
        own.mul_(1 - group["lr"] * group["weight_decay"])
        own.add_(part_of(update, parameter), alpha=-group["lr"] * piece.scale)


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """The Newton–Schulz iteration of Muon on a stack `x [S, a, b]` with a ≤ b, in the dtype of `x`.

    Keller Jordan, "Muon: an optimizer for hidden layers in neural networks" (2024). With x₀ = x / ‖x‖_F, A = x xᵀ::

        x ← 3.4445 x + (−4.7750 A + 2.0315 A²) x

    It brings the singular values to about [0.7, 1.2] and keeps the singular vectors.
    """
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=NORM_FLOOR)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def lr_scale(shape: Sequence[int], adjust_lr_fn: str) -> float:
    """The factor on the learning rate for matrices of `shape[-2:]`; see `StackedMuon`."""
    rows, columns = shape[-2:]
    if adjust_lr_fn == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


class Piece(NamedTuple):
    """Views [S, a, b], a ≤ b, of a parameter, its gradient and its momentum.

    scale: factor on the learning rate
    turned: whether the views are transposed, since the parameter has more rows than columns
    moment: [S,a,1], or [S,1,b] if turned, of the rows of the parameter; None for an optimizer without
    """

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    scale: float
    turned: bool
    moment: Tensor | None

    def split(self, slices: int) -> Iterator[Piece]:
        three = zip(self.parameter.split(slices), self.gradient.split(slices), self.momentum.split(slices), strict=True)
        moments = itertools.repeat(None) if self.moment is None else self.moment.split(slices)
        return (Piece(p, g, m, self.scale, self.turned, v) for (p, g, m), v in zip(three, moments, strict=False))


def _turned(parameter: Tensor, grad: Tensor, momentum: Tensor, moment: Tensor | None, group: dict[str, Any]) -> Piece:
    rows, columns = parameter.shape[-2:]
    # view, not reshape: writes must reach the parameter and its state.
    views = [parameter.view(-1, rows, columns), grad.reshape(-1, rows, columns), momentum.view(-1, rows, columns)]
    views += [] if moment is None else [moment.view(-1, rows, 1)]
    turned = rows > columns
    one, two, three, *four = [view.mT for view in views] if turned else views
    return Piece(one, two, three, lr_scale(parameter.shape, group["adjust_lr_fn"]), turned, four[0] if four else None)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of equal size, device and dtype, split and packed into batches of bounded size."""
    alike: dict[tuple[Any, ...], list[Piece]] = {}
    for piece in pieces:
        one = piece.parameter
        alike.setdefault((one.shape[1:], one.device, one.dtype, piece.gradient.dtype), []).append(piece)
    for (size, device, *_), group in alike.items():
        elements = CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS
        most = max(2, elements // size.numel())  # at least one per core of two
        batch: list[Piece] = []
        room = most
        for piece in (part for each in group for part in each.split(most)):
            slices = len(piece.parameter)
            if slices > room:
                yield batch
                batch, room = [], most
            batch.append(piece)
            room -= slices
        yield batch


def _nesterov(gradients: list[Tensor], momenta: list[Tensor], momentum: float) -> list[Tensor]:
    """Update the momenta in place; returns each gradient moved towards its momentum."""
    torch._foreach_lerp_(momenta, gradients, 1 - momentum)
    return list(torch._foreach_lerp(gradients, momenta, momentum))


def _orthogonalized(update: Tensor, group: dict[str, Any]) -> Tensor:
    name = group["ns_dtype"]
    if name == "auto":
        name = "bfloat16" if update.device.type != "cpu" or _cpu_multiplies_bfloat16() else "float32"
    return orthogonalize(update.to(getattr(torch, name)), group["ns_steps"])


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bf16 units. torch has no public function for that; False if it has none at all."""
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


# --- Muon that takes each head of a projection by itself --------------------------------------------------------------


class StackedHeadMuon(StackedMuon):
    """`StackedMuon` that orthogonalises the rows of each head by themselves, and scales each as the matrix that it is.

    Args:
        params: groups may have `rows`, of a head's maps in a matrix: `(4, 6)` takes its rows 0–3, 4–9, 10–13, …, each
            as a matrix; without, whole matrices
        settings: as in `StackedMuon`

    Sharded parameters: a matrix whose rows are split over ranks is gathered, as there.
    """

    def pieces(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> list[Piece]:
        if not group.get("rows"):
            return super().pieces(parameter, state, group)
        own, grad, momentum = local(parameter), local(gradient(parameter)), local(state["momentum_buffer"])
        three = zip(*(_of_heads(tensor, group) for tensor in (own, grad, momentum)), strict=True)
        return [_turned(p, g, m, None, group) for p, g, m in three]

    def _step_gathered(self, parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not group.get("rows"):
            super()._step_gathered(parameter, state, group)
            return
        (update,) = _nesterov([local(gradient(parameter))], [local(state["momentum_buffer"])], group["momentum"])
        update = whole(update, parameter)
        for part in _of_heads(update, group):
            piece = _turned(part, part, part, None, group)
            piece.parameter.copy_(_orthogonalized(piece.gradient, group) * piece.scale)
        own = local(parameter)
        own.mul_(1 - group["lr"] * group["weight_decay"])
        own.add_(part_of(update, parameter), alpha=-group["lr"])


def _of_heads(matrix: Tensor, group: dict[str, Any]) -> tuple[Tensor, ...]:
    """Views [heads, rows, columns] of a matrix, one for each map that a head has in it."""
    rows = list(group["rows"])
    return matrix.unflatten(0, (-1, sum(rows))).split(rows, 1)


# --- NorMuon for matrices and stacks of matrices, batched -------------------------------------------------------------


FLOOR = 1e-10  # keeps a gradient of zeros at zero


class StackedNorMuon(StackedMuon):
    """`StackedMuon` whose rows, one for each output neuron, are divided by their running size.

    With O the orthogonalised momentum of a matrix (a, b), whose rows are unequally long although all of its singular
    values are alike::

        v ← β₂ v + (1 − β₂) mean_b(O²)      N = O / (√v + ε)
        θ ← θ − lr · λ · θ − lr · scale(θ) · N √min(a, b) / ‖N‖_F

    An orthogonal matrix has the norm √min(a, b). With `match_rms_adamw` the factor is that of Li et al., 2025
    (arXiv:2510.05491, algorithm 1), 0.2 √(ab) / ‖N‖_F.

    Args:
        params, settings: as in `StackedMuon`
        beta2: β₂, decay rate of v per step
    """

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], beta2: float = 0.95, **settings: Any
    ) -> None:
        super().__init__(params, **settings)
        for group in self.param_groups:
            group.setdefault("beta2", beta2)

    def started(self, parameter: Tensor) -> dict[str, Tensor]:
        rows = parameter.shape[:-1] if cuts(parameter) else local(parameter).shape[:-1]
        v = torch.zeros(*rows, 1, dtype=parameter.dtype, device=parameter.device)
        return {**super().started(parameter), "second_moment": v if cuts(parameter) else placed(v, parameter, (-1,))}

    def weighed(self, update: Tensor, pieces: Sequence[Piece], group: dict[str, Any]) -> Tensor:
        sizes = [len(piece.gradient) for piece in pieces]
        parts = zip(pieces, update.split(sizes), strict=True)
        return torch.cat([_normalised(part, piece, group["beta2"]) for piece, part in parts])


def _normalised(update: Tensor, piece: Piece, beta2: float) -> Tensor:
    """O [S,a,b] → N with the norm of an orthogonal matrix."""
    moment = piece.moment
    assert moment is not None
    update = update.to(moment.dtype)
    moment.lerp_(update.square().mean(-2 if piece.turned else -1, keepdim=True), 1 - beta2)
    normal = update / (moment.sqrt() + FLOOR)
    length = torch.linalg.vector_norm(normal, dim=(-2, -1), keepdim=True).clamp(min=FLOOR)
    return normal * (min(update.shape[-2:]) ** 0.5 / length)


# --- sOAP for matrices and stacks of matrices -------------------------------------------------------------------------


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
    v.lerp_(_in_basis(g, state).square(), 1 - b2)
    update = _in_basis(_in_basis(m, state) / (v.sqrt() + group["eps"]), state, back=True)
    for side, products in _products(g, group).items():
        state[f"{side}_moment"].lerp_(products, 1 - group["shampoo_beta"])
        if t % group["frequency"] == 0:
            _renew(side, state)
    return update * ((1 - b2**t) ** 0.5 / (1 - b1**t))


def _in_basis(x: Tensor, state: dict[str, Tensor], back: bool = False) -> Tensor:
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
