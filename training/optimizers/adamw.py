"""AdamW, with weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from blockwright.blocks.scale import Scale
from blockwright.registry.index import readable
from blockwright.registry.ranges import BelowOne, NonNegative, Positive
from blockwright.training.optimizers.recipe import (
    Constraint,
    Multipliers,
    OptimizerRecipe,
    factors_of,
    multiplied,
    stepped,
    trained,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from blockwright.blocks.initialise import Weight

FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")  # meta, where costs are measured, has no such kernel


@readable
class AdamW(OptimizerRecipe):
    """Decoupled weight decay regularisation (Loshchilov & Hutter, 2019, arXiv:1711.05101).

    With g the gradient, m and v its first two moments and ^ their bias correction::

        m ← β₁ m + (1 − β₁) g      v ← β₂ v + (1 − β₂) g²
        θ ← θ − lr · λ · θ − lr · m̂ / (√v̂ + ε)

    Args:
        lr: peak learning rate, multiplied by the schedule. 4.2e-4 in DeepSeekMoE-16B and DeepSeek-V2-Lite
        betas: decay rates of the two moments per step
        weight_decay: λ, a fraction of the weight per unit of learning rate; only on matrices, expert stacks and
            convolution filters, never on norms, biases, embeddings or learned positions
        eps: ε, added to the root of the second moment
        fused: one kernel for the whole step. None: if every parameter's device supports it
        multipliers: pattern of parameter names → factor on lr: `{attention: 0.1}`
        constraint: makes the steps on matrices instead; None for none

    The defaults are those of DeepSeek's reports (β 0.9 / 0.95, λ 0.1); torch's own are β₂ 0.999 and λ 0.01 on
    *every* parameter. DeepSeek does not state which tensors are decayed: the split here is the usual one.
    """

    def __init__(
        self,
        lr: Positive = 4.2e-4,
        betas: tuple[BelowOne, BelowOne] = (0.9, 0.95),
        weight_decay: NonNegative = 0.1,
        eps: Positive = 1e-8,
        fused: bool | None = None,
        multipliers: Multipliers | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.multipliers = factors_of(multipliers)
        self.lr, self.weight_decay, self.eps = float(lr), float(weight_decay), float(eps)
        self.betas = (float(betas[0]), float(betas[1]))
        self.fused, self.constraint = fused, constraint

    def patterns(self) -> dict[str, list[str]]:
        return {"optimizer.multipliers": list(self.multipliers), **super().patterns()}

    def build(self, module: nn.Module) -> Optimizer:
        found = trained(module)
        self.check(found)
        settings = (self.lr, self.betas, self.weight_decay, self.eps, self.fused, self.multipliers, self.scales)
        return stepped([torch_adamw(found, *settings)], found, self.constraint)

    def step_norm(self, weight: Weight) -> float:
        from blockwright.blocks.widths import adam_step

        return adam_step(weight) if self.constraint is None else super().step_norm(weight)


def torch_adamw(
    found: Sequence[Weight],
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    fused: bool | None,
    multipliers: Multipliers = MappingProxyType({}),
    scales: Mapping[str, Scale] = MappingProxyType({}),
    prefix: str = "",
) -> Optimizer:
    """torch's AdamW over `found`, with group names prefixed by `prefix`; other arguments as in `AdamW`.

    Tables with sparse gradients are stepped by `RowAdam`, with the same settings.
    """
    from blockwright.training.optimizers.combined import CombinedOptimizer
    from blockwright.training.optimizers.row_adam import LocalAdamW, RowAdam

    dense, sparse = [w for w in found if not w.sparse], [w for w in found if w.sparse]
    parts: list[Optimizer] = []
    if dense:
        groups = multiplied(_decay_groups(dense, weight_decay, prefix), dense, lr, multipliers, scales, eps)
        if fused is None:  # one kernel for the whole step, where every parameter supports it
            devices = all(weight.parameter.device.type in FUSED_DEVICES for weight in dense)
            fused = devices and all(weight.parameter.is_floating_point() for weight in dense)
        parts.append(LocalAdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused))
    if sparse:
        group = {"params": [weight.parameter for weight in sparse], "name": f"{prefix}tables"}
        groups = multiplied([group], sparse, lr, multipliers, scales, eps)
        parts.append(RowAdam(groups, lr=lr, betas=betas, eps=eps))
    optimizer: Any = CombinedOptimizer(parts) if len(parts) > 1 else parts[0]
    # A fused step offers to undo the scaling of mixed precision itself. Lightning then refuses to clip, since it would
    # clip scaled gradients, even in bf16-mixed without scaling. Without the offer the scaler unscales first.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def _decay_groups(found: Sequence[Weight], weight_decay: float, prefix: str) -> list[dict[str, Any]]:
    """Parameter groups for torch, one with decay and one without. The names appear in Lightning's LR monitor."""
    decayed = [weight.parameter for weight in found if weight.decays]
    others = [weight.parameter for weight in found if not weight.decays]
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "name": f"{prefix}decay"},
        {"params": others, "weight_decay": 0.0, "name": f"{prefix}no_decay"},
    ]
    return [group for group in groups if group["params"]]
