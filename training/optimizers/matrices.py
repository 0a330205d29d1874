"""Muon, Muon by heads, NorMuon and SOAP for the hidden matrices and expert stacks, AdamW for the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Le

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.index import readable
from blockwright.registry.ranges import BelowOne, Count, NonNegative, Positive
from blockwright.training.optimizers.adamw import torch_adamw
from blockwright.training.optimizers.recipe import (
    USUAL,
    Constraint,
    Multipliers,
    OptimizerRecipe,
    factors_of,
    hidden,
    multiplied,
    stepped,
    trained,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from blockwright.blocks.initialise import Weight

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


Iterations = Annotated[int, Ge(1), Le(99)]
OF_MUON = ("lr", "weight_decay", "momentum", "ns_steps", "adjust_lr_fn", "ns_dtype")


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
        # AdamW's rate beside an optimizer that orthogonalises.
        if adamw_lr is None and adjust_lr_fn == "original":
            rule = "adjust_lr_fn=original gives matrices a learning rate that is far too large for AdamW"
            remedy = "Write optimizer.adamw_lr=3e-4, or optimizer.adjust_lr_fn=match_rms_adamw"
            raise ConfigError("optimizer.adamw_lr", None, rule, remedy)
        self.adamw_lr = self.lr if adamw_lr is None else float(adamw_lr)
        self.betas, self.eps = (float(betas[0]), float(betas[1])), float(eps)
        self.adamw_names, self.fused, self.constraint = tuple(adamw_names), fused, constraint

    def of_matrices(self, groups: Sequence[dict[str, Any]]) -> Optimizer:
        from blockwright.training.optimizers.stacked import StackedMuon

        return StackedMuon(groups, **self.settings())

    def settings(self) -> dict[str, Any]:
        """Arguments of ``StackedMuon``."""
        return {name: getattr(self, name) for name in OF_MUON}

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


OF_SOAP = ("lr", "betas", "shampoo_beta", "weight_decay", "frequency", "max_side", "eps")


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

        return StackedSOAP(groups, **{name: getattr(self, name) for name in OF_SOAP})

    def step_of_matrix(self, weight: Weight) -> float:
        from blockwright.blocks.widths import adam_step

        return adam_step(weight)

    def spreads_state(self, weight: Weight) -> bool:
        return not self.takes(weight)
