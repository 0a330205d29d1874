"""Muon that takes each head of a projection by itself, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from blockwright.registry.index import readable
from blockwright.training.optimizers.muon import Muon

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from blockwright.blocks.weights import Weight


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
