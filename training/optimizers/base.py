"""What an optimizer recipe is, and what kind of weight each parameter of a model is.

A recipe is configuration: plain values, checked when it is made, long before there is a model. `build` turns it into a
`torch.optim.Optimizer` for one model. Making a recipe imports neither torch nor Lightning.

Left out: schedules (`training/schedulers`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from registry.enforcing import enforced
from registry.errors import ConfigError
from registry.ranges import Positive
from registry.schema import conforms, fault
from training.patterns import matches, matching

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Multipliers = Mapping[str, Positive]  # pattern of parameter names (training/patterns.py) → factor on the learning rate
Kind = Literal["matrix", "filter", "table", "vector"]


class OptimizerRecipe(ABC):
    """How to make the optimizer of a model. A leaf takes plain values, so YAML and the command line can make one.

    A number outside of the range of its annotation is refused with a ConfigError (registry/ranges.py).
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        enforced("optimizer")(cls)

    @abstractmethod
    def build(self, module: nn.Module) -> Optimizer:
        """One optimizer that holds every trainable parameter of `module` exactly once."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass(frozen=True)
class Weight:
    """One trainable parameter.

    Args:
        names: every qualified name it answers to; more than one when modules share it (a tied head)
        parameter: the tensor
        kind: `matrix`, the matrix of a linear map or a stack of them `(E, a, b)`; `filter`, a convolution's;
            `table`, looked up by row and not multiplied (token embeddings, learned positions);
            `vector`, everything else: norm weights, biases, scalars
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    kind: Kind

    @property
    def decays(self) -> bool:
        """Whether weight decay belongs on it: on what multiplies activations, where smaller means smoother.

        A decayed norm weight or bias pulls activations towards zero instead, and a decayed row of a table shrinks in
        every step in which its token does not occur.
        """
        return self.kind in ("matrix", "filter")


def weights(module: nn.Module) -> list[Weight]:
    """Every trainable parameter of `module`, each once, in the order of registration.

    A parameter shared by an embedding and a head is the embedding's: the rows of rare tokens decide.
    """
    found: dict[nn.Parameter, list[tuple[str, Kind]]] = {}
    for name, owner, parameter in _places(module):
        if parameter.requires_grad:
            found.setdefault(parameter, []).append((name, _kind(name, owner, parameter)))
    if not found:
        raise ConfigError(
            "optimizer",
            type(module).__name__,
            "a model to train needs at least one parameter that requires a gradient",
            "Unfreeze a part of the model, or validate it instead of training it",
        )
    return [
        Weight(tuple(name for name, _ in places), parameter, _strictest(kind for _, kind in places))
        for parameter, places in found.items()
    ]


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(qualified name, owning module, parameter), once for every place at which a parameter is registered."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, parameter in owner.named_parameters(prefix=path, recurse=False, remove_duplicate=False):
            yield leaf, owner, parameter


def _kind(name: str, owner: nn.Module, parameter: nn.Parameter) -> Kind:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    *path, leaf = name.split(".")
    # A position block holds rows per position or per distance; only a Linear inside it is a map.
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or ("position" in path and not isinstance(owner, nn.Linear)):
        return "table"
    # The number of dimensions alone would take the biases of E experts, (E, F), and norms per head, (N, H), for maps.
    if parameter.ndim < 2 or "bias" in leaf or type(owner).__name__.lower().endswith("norm"):
        return "vector"
    return "filter" if isinstance(owner, _ConvNd) else "matrix"


def _strictest(kinds: Iterator[Kind]) -> Kind:
    """Of several roles of one shared parameter, the one that allows least."""
    order: tuple[Kind, ...] = ("table", "vector", "filter", "matrix")
    return min(kinds, key=order.index)


def factors_of(multipliers: Multipliers | None) -> dict[str, float]:
    """Multipliers as a recipe keeps them.

    Raises:
        ConfigError: no mapping, or one that is no number above 0, and finite
    """
    if not isinstance(multipliers, Mapping | None):
        rule = "maps patterns of parameter names to factors of the learning rate"
        raise ConfigError("optimizer.multipliers", multipliers, rule, "Write optimizer.multipliers={embedding: 0.1}")
    for pattern, factor in (multipliers or {}).items():
        if not conforms(factor, Positive):
            remedy = "Write e.g. 0.1; task.frozen takes a part out of training"
            raise ConfigError(f"optimizer.multipliers.{pattern}", factor, fault(factor, Positive), remedy)
    return {str(pattern): float(factor) for pattern, factor in (multipliers or {}).items()}


def check_multipliers(found: Sequence[Weight], multipliers: Multipliers) -> None:
    """Refuse a pattern that matches no weight of a model.

    Raises:
        ConfigError
    """
    names = [name for weight in found for name in weight.names]
    for pattern in multipliers:
        matching(names, [pattern], "optimizer.multipliers")


def multiplied(
    groups: Sequence[dict[str, Any]], found: Sequence[Weight], lr: float, multipliers: Multipliers
) -> list[dict[str, Any]]:
    """Split parameter groups by the multiplier of the learning rate; without multipliers they are as given.

    Args:
        groups: each with `params` and `name`
        found: the weights in them
        lr: peak learning rate of a multiplier of 1
        multipliers: the last pattern that matches a weight counts
    """
    if not multipliers:
        return list(groups)
    factors = {weight.parameter: _factor(weight, multipliers) for weight in found}
    return [
        {**group, "params": params, "lr": lr * factor, "name": group["name"] + (f"_x{factor:g}" if factor != 1 else "")}
        for group in groups
        for factor in sorted({factors[p] for p in group["params"]}, reverse=True)
        if (params := [p for p in group["params"] if factors[p] == factor])
    ]


def _factor(weight: Weight, multipliers: Multipliers) -> float:
    hits = [factor for pattern, factor in multipliers.items() if any(matches(name, pattern) for name in weight.names)]
    return float(hits[-1]) if hits else 1.0
