"""The interface of optimizer recipes, and the kind of weight of each parameter.

A recipe is configuration: plain values, checked on construction, before there is a model. `build` turns it into a
`torch.optim.Optimizer` for one model. Constructing a recipe imports neither torch nor Lightning.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import ConfigError
from blockwright.registry.ranges import Positive
from blockwright.registry.schema import conforms, fault
from blockwright.training.patterns import matches, matching

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Multipliers = Mapping[str, Positive]  # pattern of parameter names (training/patterns.py) → factor on the learning rate
Kind = Literal["matrix", "filter", "table", "vector"]


class OptimizerRecipe(ABC):
    """How to build the optimizer of a model. A subclass takes plain values, so YAML and the command line can build one.

    A number outside its annotated range is refused with a ConfigError (registry/ranges.py).
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        enforced("optimizer")(cls)

    @abstractmethod
    def build(self, module: nn.Module) -> Optimizer:
        """An optimizer with every trainable parameter of `module` exactly once."""

    def patterns(self) -> dict[str, list[str]]:
        """Path of a setting → its patterns of parameter names, each of which has to match a trained weight."""
        return {}

    def check(self, found: Sequence[Weight]) -> None:
        """Refuse a pattern that matches none of a model's weights.

        Raises:
            ConfigError
        """
        names = [name for weight in found for name in weight.names]
        for path, patterns in self.patterns().items():
            matching(names, patterns, path, of="trained parameter")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass(frozen=True)
class Weight:
    """One trainable parameter.

    Args:
        names: all its qualified names; several if modules share it (a tied head)
        parameter: the tensor
        kind: `matrix`, of a linear map or a stack of them `(E, a, b)`; `filter`, of a convolution;
            `table`, indexed by row, not multiplied (token embeddings, learned positions);
            `vector`, everything else: norm weights, biases, scalars
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    kind: Kind

    @property
    def decays(self) -> bool:
        """Whether weight decay applies to it: to what multiplies activations, where smaller means smoother.

        Decay of a norm weight or bias pulls activations towards zero instead, and a decayed row of a table shrinks in
        every step in which its token does not occur.
        """
        return self.kind in ("matrix", "filter")


def weights(module: nn.Module) -> list[Weight]:
    """Every trainable parameter of `module`, each once, in the order of registration.

    A parameter shared by an embedding and a head counts as the embedding's, because of the rows of rare tokens.
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
    """(qualified name, owning module, parameter), once for every registration of a parameter."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, parameter in owner.named_parameters(prefix=path, recurse=False, remove_duplicate=False):
            yield leaf, owner, parameter


def _kind(name: str, owner: nn.Module, parameter: nn.Parameter) -> Kind:
    from torch import nn
    from torch.nn.modules.conv import _ConvNd

    *path, leaf = name.split(".")
    # A position block has rows per position or per distance; only a Linear inside it is a map.
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or ("position" in path and not isinstance(owner, nn.Linear)):
        return "table"
    # Dimensions alone would classify the biases of E experts, (E, F), and norms per head, (N, H), as maps.
    if parameter.ndim < 2 or "bias" in leaf or type(owner).__name__.lower().endswith("norm"):
        return "vector"
    return "filter" if isinstance(owner, _ConvNd) else "matrix"


def _strictest(kinds: Iterator[Kind]) -> Kind:
    """Of several kinds of one shared parameter, the most restrictive."""
    order: tuple[Kind, ...] = ("table", "vector", "filter", "matrix")
    return min(kinds, key=order.index)


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
    groups: Sequence[dict[str, Any]], found: Sequence[Weight], lr: float, multipliers: Multipliers
) -> list[dict[str, Any]]:
    """Split parameter groups by the multiplier of the learning rate; unchanged without multipliers.

    Args:
        groups: each with `params` and `name`
        found: the weights in them
        lr: peak learning rate of a multiplier of 1
        multipliers: the last matching pattern applies
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
