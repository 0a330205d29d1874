"""NorMuon for matrices and stacks of matrices, batched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from blockwright.training.optimizers.distributed import cuts, local, placed
from blockwright.training.optimizers.stacked_muon import Piece, StackedMuon

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
