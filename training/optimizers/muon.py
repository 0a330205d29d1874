"""Muon for the hidden matrices and expert stacks, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge, Le

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.ranges import BelowOne, NonNegative, Positive
from blockwright.registry.readable import readable
from blockwright.training.optimizers.adamw import torch_adamw
from blockwright.training.optimizers.base import (
    Multipliers,
    OptimizerRecipe,
    factors_of,
    multiplied,
    trained,
)
from blockwright.training.patterns import matches

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from blockwright.blocks.weights import Weight


USUAL = ("embedding", "head", "gating")  # not every model has all of them


@readable
class Muon(OptimizerRecipe):
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) as scaled by Moonshot (2025, arXiv:2502.16982).

    A hidden matrix moves by its orthogonalised momentum, so that all directions move equally (`StackedMuon` has the
    formula); each expert of a stack `(E, a, b)` is a separate matrix. Everything else is left to AdamW:

    * vectors: norm weights, biases; and a matrix with a side of 1, which is a vector;
    * tables: token embeddings and learned positions, whose rows get separate gradients;
    * convolution filters, which are not matrices;
    * what `adamw_names` matches. The head has sparse targets as the embedding has sparse inputs; a router's rows
      are the experts' keys, and an orthogonal update would push rarely chosen experts as hard as busy ones.

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

    How this differs from others: `torch.optim.Muon` takes no expert stacks and no other parameters, leaving two
    optimizers to step; here it is one, with one state. Jordan's recipe does not decay; Moonshot's does, as here.
    Fused projections (gate and up in one matrix) are orthogonalised together.
    """

    def __init__(
        self,
        lr: Positive = 4.2e-4,
        momentum: BelowOne = 0.95,
        weight_decay: NonNegative = 0.1,
        ns_steps: Annotated[int, Ge(1), Le(99)] = 5,
        adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
        adamw_lr: Positive | None = None,
        betas: tuple[BelowOne, BelowOne] = (0.9, 0.95),
        eps: Positive = 1e-8,
        adamw_names: Sequence[str] = USUAL,
        ns_dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        fused: bool | None = None,
        multipliers: Multipliers | None = None,
    ) -> None:
        self.multipliers = factors_of(multipliers)
        self.lr, self.momentum, self.weight_decay = float(lr), float(momentum), float(weight_decay)
        self.ns_steps = ns_steps
        self.adjust_lr_fn = _one_of("adjust_lr_fn", adjust_lr_fn, ("match_rms_adamw", "original"))
        self.betas, self.eps = (float(betas[0]), float(betas[1])), float(eps)
        self.adamw_names = tuple(adamw_names)
        self.ns_dtype = _one_of("ns_dtype", ns_dtype, ("auto", "float32", "bfloat16"))
        self.fused = fused
        if adamw_lr is None and adjust_lr_fn == "original":
            raise ConfigError(
                "optimizer.adamw_lr",
                None,
                "adjust_lr_fn=original gives matrices a learning rate that is far too large for AdamW",
                "Write optimizer.adamw_lr=3e-4, or optimizer.adjust_lr_fn=match_rms_adamw",
            )
        self.adamw_lr = self.lr if adamw_lr is None else float(adamw_lr)

    def patterns(self) -> dict[str, list[str]]:
        own = [pattern for pattern in self.adamw_names if pattern not in USUAL]
        return {"optimizer.multipliers": list(self.multipliers), "optimizer.adamw_names": own}

    def build(self, module: nn.Module) -> Optimizer:
        from blockwright.training.optimizers.combined import CombinedOptimizer
        from blockwright.training.optimizers.stacked_muon import StackedMuon

        found = trained(module)
        self.check(found)
        hidden = [weight for weight in found if self.orthogonalizes(weight)]
        rest = [weight for weight in found if not self.orthogonalizes(weight)]
        parts: list[Optimizer] = []
        if hidden:
            parameters = [weight.parameter for weight in hidden]
            group = {"params": parameters, "name": "muon", "weight_decay": self.weight_decay}
            parts.append(
                StackedMuon(
                    multiplied([group], hidden, self.lr, self.multipliers, self.scales),
                    lr=self.lr,
                    weight_decay=self.weight_decay,
                    momentum=self.momentum,
                    ns_steps=self.ns_steps,
                    adjust_lr_fn=self.adjust_lr_fn,
                    ns_dtype=self.ns_dtype,
                )
            )
        if rest:
            settings = (self.adamw_lr, self.betas, self.weight_decay, self.eps, self.fused)
            parts.append(torch_adamw(rest, *settings, self.multipliers, self.scales, prefix="adamw_"))
        return CombinedOptimizer(parts)

    def orthogonalizes(self, weight: Weight) -> bool:
        """Whether Muon takes this weight."""
        is_map = weight.kind == "matrix" and min(weight.parameter.shape[-2:]) > 1
        return is_map and not any(matches(name, p) for name in weight.names for p in self.adamw_names)

    def step_norm(self, weight: Weight) -> float:
        from blockwright.blocks.widths import adam_step
        from blockwright.training.optimizers.stacked_muon import lr_scale

        return lr_scale(weight.parameter.shape, self.adjust_lr_fn) if self.orthogonalizes(weight) else adam_step(weight)


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ConfigError(
            f"optimizer.{name}", value, f"must be one of {', '.join(choices)}", did_you_mean(value, choices)
        )
    return value
