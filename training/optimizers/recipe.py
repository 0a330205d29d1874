"""The interface of optimizer recipes, the kind of weight of each parameter, and constraints on where matrices may be.

A recipe is configuration: plain values, checked on construction, before there is a model. `build` turns it into a
`torch.optim.Optimizer` for one model. Constructing a recipe imports neither torch nor Lightning.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from blockwright.blocks.scale import ONE, Scale
from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.index import readable
from blockwright.registry.ranges import Positive
from blockwright.registry.schema import conforms, fault
from blockwright.training.patterns import matches, matching

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from blockwright.blocks.initialise import Weight

USUAL = ("embedding", "head", "gating")  # whose matrices are no hidden ones; not every model has all of them
Norms = Callable[["Tensor"], "Tensor"]  # of a tensor like the weight, over ``dims``, which are kept; over all ranks


class Constraint(ABC):
    """Where the matrices that it holds may be. An optimizer gives a direction; the constraint makes the step.

    A recipe takes it as ``constraint``, and its settings are its constructor's, plain values. Each expert of a stack
    (E, a, b) is a matrix of its own. Decay of a weight that is held is left out: the constraint sets its size. A matrix
    that begins at 0, or a row where ``dims`` are those of rows, has no size to keep: it takes the optimizer's own step.

    Args:
        free: patterns of parameter names that are not held (training/patterns.py). The norm of the head's rows is the
            sharpness of the model's predictions, and that of a router's the sharpness of its choice

    Class attributes:
        dims: over which the norms are taken: (-2, -1) for those of matrices, (-1,) for those of rows, which are those
            of output neurons
    """

    dims: ClassVar[tuple[int, ...]] = (-2, -1)

    def __init__(self, free: Sequence[str] = USUAL) -> None:
        self.free = tuple(free)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        enforced("optimizer.constraint")(cls)

    def holds(self, weight: Weight) -> bool:
        """Whether it is a matrix that is held: no table, vector or filter, and none with a side of 1."""
        return hidden(weight, self.free)

    @abstractmethod
    def moved(self, weight: Tensor, update: Tensor, rate: float, radius: Tensor, norms: Norms) -> Tensor:
        """The weight after a step.

        Args:
            weight: [..., a, b], or this rank's part of it
            update: like the weight; what the optimizer would add, up to a factor above 0
            rate: learning rate of the step
            radius: the norms of the weight before the first step
            norms: of a tensor like the weight
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def hidden(weight: Weight, but: Sequence[str]) -> bool:
    """Whether it is a matrix or a stack of them, with no side of 1, whose names no pattern of ``but`` matches."""
    is_map = weight.kind == "matrix" and min(weight.parameter.shape[-2:]) > 1
    return is_map and not any(matches(name, pattern) for name in weight.names for pattern in but)


Multipliers = Mapping[str, Positive]  # pattern of parameter names (training/patterns.py) → factor on the learning rate


class OptimizerRecipe(ABC):
    """How to build the optimizer of a model. A subclass takes plain values, so YAML and the command line can build one.

    A number outside its annotated range is refused with a ConfigError (registry/ranges.py).

    Attributes:
        scales: name of a weight → factors on its rate, decay and ε, of the run's parametrisation; not among them: 1
        constraint: makes the steps on the weights that it holds; None, the default, for none
    """

    scales: Mapping[str, Scale] = MappingProxyType({})
    constraint: Constraint | None = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        enforced("optimizer")(cls)

    @abstractmethod
    def build(self, module: nn.Module) -> Optimizer:
        """An optimizer with every trainable parameter of `module` exactly once."""

    def scaled(self, scales: Mapping[str, Scale]) -> Self:
        """The same recipe with factors for single weights."""
        other = copy.copy(self)
        other.scales = dict(scales)
        return other

    def step_norm(self, weight: Weight) -> float:
        """Spectral norm of a step of a matrix, filter or stack at a learning rate of 1, up to a constant.

        A parametrisation by width asks how it grows with the shape.

        Raises:
            ConfigError: the recipe does not say, which is the default
        """
        name = type(self).__name__ + ("" if self.constraint is None else f" with {type(self.constraint).__name__}")
        rule = f"{name} does not say how large its steps are, and rates follow from that"
        raise ConfigError("optimizer", name, rule, "Write optimizer=adamw or muon, without a constraint")

    def spreads_state(self, weight: Weight) -> bool:
        """Whether its state of a weight is spread over ranks as the weight is; otherwise each rank has it whole."""
        return True

    def patterns(self) -> dict[str, list[str]]:
        """Path of a setting → its patterns of parameter names, each of which has to match a trained weight."""
        held = self.constraint
        return {} if held is None else {"optimizer.constraint.free": [p for p in held.free if p not in USUAL]}

    def check(self, found: Sequence[Weight]) -> None:
        """Refuse a pattern that matches none of a model's weights, and a weight without factors, if others have some.

        Raises:
            ConfigError: there is such a pattern or weight
        """
        names = [name for weight in found for name in weight.names]
        for path, patterns in self.patterns().items():
            matching(names, patterns, path, of="trained parameter")
        added = [weight.names[0] for weight in found if weight.names[0] not in self.scales] if self.scales else []
        if added:
            rule = "is a weight that a start adds; the base does not have it, so it has no factors"
            raise ConfigError(
                "parametrisation", added[0], rule, "Write parametrisation=standard, or leave the start out"
            )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def trained(module: nn.Module) -> list[Weight]:
    """The weights of a model to train.

    Raises:
        ConfigError: there is none
    """
    from blockwright.blocks.initialise import weights

    if not (found := weights(module)):
        raise ConfigError(
            "optimizer",
            type(module).__name__,
            "a model to train needs at least one parameter that requires a gradient",
            "Unfreeze a part of the model, or validate it instead of training it",
        )
    return found


def stepped(parts: Sequence[Optimizer], found: Sequence[Weight], constraint: Constraint | None) -> Optimizer:
    """One optimizer of several, which have all of the weights; with a constraint, it makes the steps on those it holds.

    Raises:
        ConfigError: it holds none of them
    """
    from blockwright.training.optimizers.combined import CombinedOptimizer, ConstrainedOptimizer

    if constraint is None:
        return parts[0] if len(parts) == 1 else CombinedOptimizer(parts)
    held = [weight.parameter for weight in found if constraint.holds(weight)]
    if not held:
        rule = f"holds no trained weight: {', '.join(constraint.free)} are free, and it holds matrices alone"
        raise ConfigError("optimizer.constraint", type(constraint).__name__, rule, "Write optimizer/constraint=null")
    return ConstrainedOptimizer(parts, constraint, held)


def factors_of(multipliers: Multipliers | None) -> dict[str, float]:
    """Validate multipliers.

    Raises:
        ConfigError: not a mapping, or a factor that is not a finite number above 0
    """
    if not isinstance(multipliers, Mapping | None):
        rule = "maps patterns of parameter names to factors of the learning rate"
        raise ConfigError("optimizer.multipliers", multipliers, rule, "Write optimizer.multipliers={embedding: 0.1}")
    for pattern, factor in (multipliers or {}).items():
        if not conforms(factor, Positive):
            remedy = "Write e.g. 0.1; use task.frozen to exclude a part from training"
            raise ConfigError(f"optimizer.multipliers.{pattern}", factor, fault(factor, Positive), remedy)
    return {str(pattern): float(factor) for pattern, factor in (multipliers or {}).items()}


def multiplied(
    groups: Sequence[dict[str, Any]],
    found: Sequence[Weight],
    lr: float,
    multipliers: Multipliers,
    scales: Mapping[str, Scale] = MappingProxyType({}),
    eps: float | None = None,
) -> list[dict[str, Any]]:
    """Split parameter groups by the factors of their weights; unchanged without any.

    Args:
        groups: each with `params` and `name`
        found: the weights in them
        lr: peak learning rate of a factor of 1
        multipliers: the last matching pattern applies
        scales: name of a weight → further factors
        eps: Adam's ε; None for an optimizer without
    """
    if not multipliers and not scales:
        return list(groups)
    factors = {w.parameter: (_factor(w, multipliers), scales.get(w.names[0], ONE)) for w in found}
    return [
        _group({**group, "params": params}, lr, eps, *factor)
        for group in groups
        for factor in sorted({factors[p] for p in group["params"]}, reverse=True)
        if (params := [p for p in group["params"] if factors[p] == factor])
    ]


def _group(group: dict[str, Any], lr: float, eps: float | None, factor: float, scale: Scale) -> dict[str, Any]:
    """A group with its factors: lr·λ stays as it is under those of a parametrisation."""
    whole = factor * scale.rate
    name = group["name"] + (f"_x{whole:g}" if whole != 1 else "") + (f"_eps{scale.eps:g}" if scale.eps != 1 else "")
    decay = {"weight_decay": group["weight_decay"] / scale.rate} if "weight_decay" in group else {}
    return {**group, **decay, "lr": lr * whole, "name": name, **({} if eps is None else {"eps": eps * scale.eps})}


def _factor(weight: Weight, multipliers: Multipliers) -> float:
    hits = [factor for pattern, factor in multipliers.items() if any(matches(name, pattern) for name in weight.names)]
    return float(hits[-1]) if hits else 1.0


FLOOR = 1e-30  # keeps a step without a gradient at zero


@readable
class Hyperball(Constraint):
    """Weights and updates of fixed Frobenius norms (Wen et al., 2026, arXiv:2606.16899).

    With u the direction of any optimizer, R = ‖θ₀‖_F and N(x) = x / ‖x‖_F::

        θ ← R · N(θ − lr · R · N(u))

    The learning rate is then the angle of a step, about 0.002 to 0.02, for every shape and optimizer; nothing decays.
    R is the norm at the run's first step, also where the run starts from trained weights. Where R is 0, as of an
    adapter's B, the optimizer's own step is made instead.

    Args:
        free: as of ``Constraint``. The paper holds the matrices of the network; embeddings, which are looked up, are
            held by none
    """

    def moved(self, weight: Tensor, update: Tensor, rate: float, radius: Tensor, norms: Norms) -> Tensor:
        step = weight + update * (rate * radius / norms(update).clamp(min=FLOOR))
        return step * (radius / norms(step).clamp(min=FLOOR))
