"""Muon, Muon by heads, and NorMuon for the hidden matrices and expert stacks; AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Le

from blockwright.registry.index import readable
from blockwright.registry.ranges import BelowOne, NonNegative, Positive
from blockwright.training.optimizers.matrices import AdjustLr, MatrixRecipe, NsDtype, one_of, rate_of_rest
from blockwright.training.optimizers.recipe import USUAL, Constraint, Multipliers, factors_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from blockwright.blocks.weights import Weight

Iterations = Annotated[int, Ge(1), Le(99)]
SETTINGS = ("lr", "weight_decay", "momentum", "ns_steps", "adjust_lr_fn", "ns_dtype")


@readable
class Muon(MatrixRecipe):
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) as scaled by Moonshot (2025, arXiv:2502.16982).

    A hidden matrix moves by its orthogonalised momentum, so that all directions move equally (`StackedMuon` has the
    formula). `MatrixRecipe` says which matrices are hidden; AdamW takes the rest.

    Args:
        lr: peak learning rate of the matrices, multiplied by the schedule
        momentum: decay rate per step of the gradient's running mean, Nesterov style
        weight_decay: λ, decoupled, a fraction of the weight per unit of learning rate; for both optimizers
        ns_steps: Newton–Schulz iterations, each three matrix products
        adjust_lr_fn: `match_rms_adamw` scales each update to the size of AdamW's, 0.2 · √max(a, b), so that AdamW's
            lr and λ carry over; `original` scales by √max(1, a/b), and needs a larger lr, about 0.02
        adamw_lr: learning rate of the rest; None: the same lr, which `original` does not allow
        betas: AdamW's decay rates
        eps: AdamW's ε
        adamw_names: patterns of parameter names whose matrices go to AdamW (training/patterns.py)
        ns_dtype: dtype of Newton–Schulz: float32, bfloat16, or auto: bfloat16 except on CPUs without bf16 units
        fused: AdamW's kernel, as in the recipe `AdamW`
        multipliers: pattern of parameter names → factor on lr or adamw_lr: `{attention: 0.1}`
        constraint: makes the steps on matrices instead; None for none

    How this differs from others: `torch.optim.Muon` takes no expert stacks and no other parameters, leaving two
    optimizers to step; here it is one, with one state. Jordan's recipe does not decay; Moonshot's does, as here.
    Fused projections (gate and up in one matrix) are orthogonalised together.
    """

    group = "muon"

    def __init__(
        self,
        lr: Positive = 4.2e-4,
        momentum: BelowOne = 0.95,
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
        self.multipliers = factors_of(multipliers)
        self.lr, self.momentum, self.weight_decay = float(lr), float(momentum), float(weight_decay)
        self.ns_steps = ns_steps
        self.adjust_lr_fn = one_of("adjust_lr_fn", adjust_lr_fn, ("match_rms_adamw", "original"))
        self.ns_dtype = one_of("ns_dtype", ns_dtype, ("auto", "float32", "bfloat16"))
        self.adamw_lr = rate_of_rest(adamw_lr, self.lr, adjust_lr_fn)
        self.betas, self.eps = (float(betas[0]), float(betas[1])), float(eps)
        self.adamw_names, self.fused, self.constraint = tuple(adamw_names), fused, constraint

    def of_matrices(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        from blockwright.training.optimizers.stacked import StackedMuon

        return StackedMuon(groups, **self.settings())

    def settings(self) -> dict[str, Any]:
        """Arguments of ``StackedMuon``."""
        return {name: getattr(self, name) for name in SETTINGS}

    def step_of_matrix(self, weight: Weight) -> float:
        from blockwright.training.optimizers.stacked import lr_scale

        return lr_scale(weight.parameter.shape, self.adjust_lr_fn)


@readable
class HeadMuon(Muon):
    """Muon that orthogonalises the rows of each head of an attention's projections by themselves.

    Kimi K3 (arXiv:2607.24653, section 2.5, "Per-Head Muon") and GLM-5 (arXiv:2602.15763, "Muon Split"). In a matrix of
    all heads, those with large momenta take the directions of the others; apart, all heads move equally. Blocks say
    which matrices hold heads, and how many rows each has (`Block.head_rows`): of queries, keys and values, and of the
    projections up from latents, in which a head's keys and values are two matrices. All else is `Muon`'s.

    Args:
        lr, momentum, weight_decay, ns_steps, adjust_lr_fn, adamw_lr, betas, eps, adamw_names, ns_dtype, fused,
            multipliers, constraint: as in `Muon`

    How this differs from others: `adjust_lr_fn` sees the shape of a head's matrix, as in DeepSpeed. The output
    projection, whose columns are of heads, is orthogonalised as one. A parametrisation by width takes the steps of
    different heads for unrelated.
    """

    group = "muon"

    def of_matrices(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        from blockwright.training.optimizers.stacked import StackedHeadMuon

        return StackedHeadMuon(groups, **self.settings())

    def grouped(self, own: Sequence[Weight]) -> list[dict[str, Any]]:
        alike: dict[tuple[int, ...], list[Weight]] = {}
        for weight in own:
            alike.setdefault(weight.head_rows, []).append(weight)
        return [
            {
                "params": [weight.parameter for weight in alike[rows]],
                "name": "_".join((self.group, *(f"rows{n}" for n in rows))),
                "rows": rows,
            }
            for rows in sorted(alike)
        ]

    def step_of_matrix(self, weight: Weight) -> float:
        from blockwright.training.optimizers.stacked import lr_scale

        rows, columns = max(weight.head_rows, default=weight.parameter.shape[-2]), weight.parameter.shape[-1]
        return lr_scale((rows, columns), self.adjust_lr_fn)


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
