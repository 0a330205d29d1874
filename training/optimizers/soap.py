"""SOAP for the hidden matrices and expert stacks, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockwright.registry.index import readable
from blockwright.registry.ranges import BelowOne, Count, NonNegative, Positive
from blockwright.training.optimizers.matrices import MatrixRecipe
from blockwright.training.optimizers.recipe import USUAL, Constraint, Multipliers, factors_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from blockwright.blocks.weights import Weight

SETTINGS = ("lr", "betas", "shampoo_beta", "weight_decay", "frequency", "max_side", "eps")


@readable
class SOAP(MatrixRecipe):
    """Adam in the eigenbasis of Shampoo's preconditioners (Vyas et al., 2024, arXiv:2409.11321).

    Of each hidden matrix the gradient's second moments over its rows and over its columns are kept, and Adam works in
    their eigenvectors (`StackedSOAP` has the formula). The size of a step is Adam's, so that AdamW's lr and λ carry
    over. `MatrixRecipe` says which matrices are hidden; AdamW takes the rest.

    Args:
        lr: peak learning rate, multiplied by the schedule
        betas: decay rates per step of the two moments
        shampoo_beta: that of the second moments over rows and columns; None: the second of betas
        weight_decay: λ, a fraction of the weight per unit of learning rate; only on what decays in `AdamW`
        frequency: steps from one eigenbasis to the next
        max_side: a side with more rows than this keeps its own basis: the state of a side is 2 n² numbers for n
        eps: ε, added to the root of the second moment
        adamw_lr: learning rate of the rest; None: the same lr
        adamw_names: patterns of parameter names whose matrices go to AdamW (training/patterns.py)
        fused: AdamW's kernel, as in the recipe `AdamW`
        multipliers: pattern of parameter names → factor on lr or adamw_lr: `{attention: 0.1}`
        constraint: makes the steps on matrices instead; None for none

    Runs that round otherwise, over ranks or with windows in another order, end further apart than with other
    optimizers: where a first gradient has no full rank, eigenvectors of its null space are arbitrary, and Adam in their
    basis is not. In double precision weights differ by 9 % after three steps. That is the algorithm's; compare arms by
    several seeds.

    How this differs from the authors' code: that preconditions embeddings and the head on the side of the model's
    width, and takes an expert stack as a tensor of three sides; here each expert is a matrix of its own.
    """

    group = "soap"

    def __init__(
        self,
        lr: Positive = 4.2e-4,
        betas: tuple[BelowOne, BelowOne] = (0.95, 0.95),
        shampoo_beta: BelowOne | None = None,
        weight_decay: NonNegative = 0.1,
        frequency: Count = 10,
        max_side: Count = 8192,
        eps: Positive = 1e-8,
        adamw_lr: Positive | None = None,
        adamw_names: Sequence[str] = USUAL,
        fused: bool | None = None,
        multipliers: Multipliers | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.multipliers = factors_of(multipliers)
        self.lr, self.weight_decay, self.eps = float(lr), float(weight_decay), float(eps)
        self.betas = (float(betas[0]), float(betas[1]))
        self.shampoo_beta = self.betas[1] if shampoo_beta is None else float(shampoo_beta)
        self.frequency, self.max_side = frequency, max_side
        self.adamw_lr = self.lr if adamw_lr is None else float(adamw_lr)
        self.adamw_names, self.fused, self.constraint = tuple(adamw_names), fused, constraint

    def of_matrices(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        from blockwright.training.optimizers.stacked import StackedSOAP

        return StackedSOAP(groups, **{name: getattr(self, name) for name in SETTINGS})

    def step_of_matrix(self, weight: Weight) -> float:
        from blockwright.blocks.widths import adam_step

        return adam_step(weight)

    def spreads_state(self, weight: Weight) -> bool:
        return not self.takes(weight)
