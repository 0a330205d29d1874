"""What Muon and its relatives share: one optimizer for the hidden matrices and expert stacks, AdamW for the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.training.optimizers.adamw import torch_adamw
from blockwright.training.optimizers.recipe import (
    USUAL,
    Constraint,
    OptimizerRecipe,
    hidden,
    multiplied,
    stepped,
    trained,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from blockwright.blocks.weights import Weight

AdjustLr = Literal["match_rms_adamw", "original"]
NsDtype = Literal["auto", "float32", "bfloat16"]
S = TypeVar("S", bound=str)


class MatrixRecipe(OptimizerRecipe):
    """An optimizer for hidden matrices, each expert of a stack `(E, a, b)` a separate one. AdamW takes everything else:

    * vectors: norm weights, biases; and a matrix with a side of 1, which is a vector;
    * tables: token embeddings and learned positions, whose rows get separate gradients;
    * convolution filters, which are not matrices;
    * what `adamw_names` matches. The head has sparse targets as the embedding has sparse inputs; a router's rows
      are the experts' keys, and an update that treats all directions alike would push rarely chosen experts as hard as
      busy ones.

    Attributes, to be set by the constructor, which a subclass writes out as the schema of its configuration:
        lr: peak learning rate of the matrices, multiplied by the schedule
        weight_decay: λ, decoupled, a fraction of the weight per unit of learning rate; for both optimizers
        adamw_lr: learning rate of the rest
        betas, eps, fused: AdamW's, of the rest
        adamw_names: patterns of parameter names whose matrices go to AdamW (training/patterns.py)
        multipliers: pattern of parameter names → factor on lr or adamw_lr: `{attention: 0.1}`
        constraint: makes the steps on matrices instead (``Constraint``); None for none
        group: name of the matrices' parameter groups, as in the progress bar and the logs
    """

    group: str
    lr: float
    weight_decay: float
    adamw_lr: float
    betas: tuple[float, float]
    eps: float
    adamw_names: tuple[str, ...]
    fused: bool | None
    multipliers: Mapping[str, float]
    constraint: Constraint | None

    @abstractmethod
    def of_matrices(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        """The optimizer of these groups of hidden matrices, each with its rate and decay."""

    @abstractmethod
    def step_of_matrix(self, weight: Weight) -> float:
        """``step_norm`` of a hidden matrix."""

    def patterns(self) -> dict[str, list[str]]:
        own = [pattern for pattern in self.adamw_names if pattern not in USUAL]
        named = {"optimizer.multipliers": list(self.multipliers), "optimizer.adamw_names": own}
        return {**named, **super().patterns()}

    def build(self, module: nn.Module) -> Optimizer:
        found = trained(module)
        self.check(found)
        own = [weight for weight in found if self.takes(weight)]
        rest = [weight for weight in found if not self.takes(weight)]
        parts: list[Optimizer] = []
        if own:
            groups = [{**group, "weight_decay": self.weight_decay} for group in self.grouped(own)]
            parts.append(self.of_matrices(multiplied(groups, own, self.lr, self.multipliers, self.scales)))
        if rest:
            settings = (self.adamw_lr, self.betas, self.weight_decay, self.eps, self.fused)
            parts.append(torch_adamw(rest, *settings, self.multipliers, self.scales, prefix="adamw_"))
        return stepped(parts, found, self.constraint)

    def grouped(self, own: Sequence[Weight]) -> list[dict[str, Any]]:
        """Groups of the hidden matrices, with their names and what ``of_matrices`` treats them by."""
        return [{"params": [weight.parameter for weight in own], "name": self.group}]

    def takes(self, weight: Weight) -> bool:
        """Whether it is one of the hidden matrices."""
        return hidden(weight, self.adamw_names)

    def step_norm(self, weight: Weight) -> float:
        from blockwright.blocks.widths import adam_step

        if self.constraint is not None:
            return super().step_norm(weight)
        return self.step_of_matrix(weight) if self.takes(weight) else adam_step(weight)


def one_of(name: str, value: S, choices: Sequence[str]) -> S:
    """A value that has to be one of several.

    Raises:
        ConfigError: it is not
    """
    if value not in choices:
        rule = f"must be one of {', '.join(choices)}"
        raise ConfigError(f"optimizer.{name}", value, rule, did_you_mean(value, choices))
    return value


def rate_of_rest(adamw_lr: float | None, lr: float, adjust_lr_fn: AdjustLr) -> float:
    """AdamW's rate beside an optimizer that orthogonalises.

    Raises:
        ConfigError: the rate of the matrices is none for AdamW, and there is no other
    """
    if adamw_lr is None and adjust_lr_fn == "original":
        rule = "adjust_lr_fn=original gives matrices a learning rate that is far too large for AdamW"
        remedy = "Write optimizer.adamw_lr=3e-4, or optimizer.adjust_lr_fn=match_rms_adamw"
        raise ConfigError("optimizer.adamw_lr", None, rule, remedy)
    return lr if adamw_lr is None else float(adamw_lr)
