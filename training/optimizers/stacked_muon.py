"""Muon for matrices and stacks of matrices, batched."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            whole: list[_Piece] = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                gradient, momentum = _gradient(parameter), state["momentum_buffer"]
                if _cuts_matrices(parameter):
                    _step_gathered(parameter, gradient, momentum, group)
                else:
                    scale = lr_scale(parameter.shape, group["adjust_lr_fn"])
                    whole.append(_piece(_local(parameter), _local(gradient), _local(momentum), scale))
            for batch in _batches(whole):
                _step_batch(batch, group)
        return loss


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


class _Piece(NamedTuple):
    """Views `[S, a, b]`, a ≤ b, of a parameter, its gradient and its momentum; `scale` is that on the learning rate."""

    parameter: Tensor
    gradient: Tensor
    momentum: Tensor
    scale: float

    def split(self, slices: int) -> Iterator[_Piece]:
        parts = zip(self.parameter.split(slices), self.gradient.split(slices), self.momentum.split(slices), strict=True)
        return (_Piece(parameter, gradient, momentum, self.scale) for parameter, gradient, momentum in parts)


def _piece(parameter: Tensor, gradient: Tensor, momentum: Tensor, scale: float) -> _Piece:
    rows, columns = parameter.shape[-2:]
    # view, not reshape: writes must reach the parameter and its momentum.
    views = (parameter.view(-1, rows, columns), gradient.reshape(-1, rows, columns), momentum.view(-1, rows, columns))
    wide, gradients, momenta = (view.mT if rows > columns else view for view in views)
    return _Piece(wide, gradients, momenta, scale)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Pieces of equal size, device and dtype, split and packed into batches of bounded size."""
    alike: dict[tuple[Any, ...], list[_Piece]] = {}
    for piece in pieces:
        one = piece.parameter
        alike.setdefault((one.shape[1:], one.device, one.dtype, piece.gradient.dtype), []).append(piece)
    for (size, device, *_), group in alike.items():
        elements = CPU_ELEMENTS if device.type == "cpu" else DEVICE_ELEMENTS
        most = max(2, elements // size.numel())  # at least one per core of two
        batch: list[_Piece] = []
        room = most
        for piece in (part for whole in group for part in whole.split(most)):
            slices = len(piece.parameter)
            if slices > room:
                yield batch
                batch, room = [], most
            batch.append(piece)
            room -= slices
        yield batch


def _step_batch(batch: list[_Piece], group: dict[str, Any]) -> None:
    """One step of Muon on pieces of equal size."""
    updates = _nesterov([piece.gradient for piece in batch], [piece.momentum for piece in batch], group["momentum"])
    update = _orthogonalized(torch.cat(updates), group)
    torch._foreach_mul_([piece.parameter for piece in batch], 1 - group["lr"] * group["weight_decay"])
    for piece, part in zip(batch, update.split([len(piece.parameter) for piece in batch]), strict=True):
        piece.parameter.add_(part, alpha=-group["lr"] * piece.scale)


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


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, placed like its parameter: tensor parallelism may leave partial sums."""
    gradient: Any = parameter.grad
    placements = getattr(parameter, "placements", None)
    if getattr(gradient, "placements", None) != placements:
        return gradient.redistribute(placements=placements)
    return gradient


def _cuts_matrices(parameter: Tensor) -> bool:
    """Whether the parameter is a DTensor with a shard along one of its last two dimensions."""
    placements = getattr(parameter, "placements", ())
    return any(getattr(placement, "dim", -1) >= parameter.ndim - 2 for placement in placements)


def _step_gathered(parameter: Any, gradient: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
    """One step of Muon on a DTensor whose matrices are split over several ranks."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    (update,) = _nesterov([_local(gradient)], [_local(momentum)], group["momentum"])
    whole = DTensor.from_local(update, mesh, placements, shape=shape, stride=parameter.stride()).full_tensor()
    matrices = whole.reshape(-1, *shape[-2:])
    if shape[-2] > shape[-1]:
        whole = _orthogonalized(matrices.mT, group).mT.reshape(shape)
    else:
        whole = _orthogonalized(matrices, group).reshape(shape)
    # Every rank has computed the same; src_data_rank=None takes its own part without communication.
    part = distribute_tensor(whole, mesh, placements, src_data_rank=None)
    local = _local(parameter)
    local.mul_(1 - group["lr"] * group["weight_decay"])
    local.add_(_local(part), alpha=-group["lr"] * lr_scale(shape, group["adjust_lr_fn"]))
