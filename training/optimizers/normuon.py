"""NorMuon for the hidden matrices and expert stacks, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockwright.registry.index import readable
from blockwright.registry.ranges import BelowOne, NonNegative, Positive
from blockwright.training.optimizers.base import Multipliers
from blockwright.training.optimizers.constraint import USUAL, Constraint
from blockwright.training.optimizers.matrices import AdjustLr, NsDtype
from blockwright.training.optimizers.muon import Iterations, Muon

if TYPE_CHECKING:
    from torch.optim import Optimizer


@readable
class NorMuon(Muon):
    """Muon whose output neurons move equally far (Li et al., 2025, arXiv:2510.05491).

    An orthogonalised momentum has rows of unequal length. Each row is divided by the running root mean square of its
    own, and the matrix then has the norm that Muon's has (`StackedNorMuon` has the formula). One more number of state
    for each output neuron.

    Args:
        lr, momentum, weight_decay, ns_steps, adjust_lr_fn, adamw_lr, betas, eps, adamw_names, ns_dtype, fused,
            multipliers, constraint: as in `Muon`
        beta2: decay rate per step of the running size of rows

    How this differs from the paper: with `match_rms_adamw` it is the paper's; `original` scales as Muon's `original`
    does.
    """

    group = "normuon"

    def __init__(
        self,
        lr: Positive = 4.2e-4,
        momentum: BelowOne = 0.95,
        beta2: BelowOne = 0.95,
        weight_decay: NonNegative = 0.1,
        ns_steps: Iterations = 5,
        adjust_lr_fn: AdjustLr = "match_rms_adamw",
        adamw_lr: Positive | None = None,
        betas: tuple[BelowOne, BelowOne] = (0.9, 0.95),
        eps: Positive = 1e-8,
        adamw_names: Sequence[str] = USUAL,
        ns_dtype: NsDtype = "auto",
        fused: bool | None = None,
        multipliers: Multipliers | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        of_matrices = (lr, momentum, weight_decay, ns_steps, adjust_lr_fn)
        super().__init__(*of_matrices, adamw_lr, betas, eps, adamw_names, ns_dtype, fused, multipliers, constraint)
        self.beta2 = float(beta2)

    def of_matrices(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        from blockwright.training.optimizers.stacked import StackedNorMuon

        return StackedNorMuon(groups, beta2=self.beta2, **self.settings())
