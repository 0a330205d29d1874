"""Models of several widths from one configuration: what grows, by how much, and the base of their parametrisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockwright.registry import ConfigError
from blockwright.registry.ranges import Count
from blockwright.training.configuration.composing import compose_config
from blockwright.training.configuration.run import STANDARD


@dataclass(frozen=True)
class Family:
    """A composition at several widths.

    Args:
        first: d_model of the smallest
        grow: its other sizes that grow with d_model, as overrides of the model: ``{attention: {n_heads: 4}}``
    """

    first: Count
    grow: Mapping[str, Any]

    def overrides(self, width: int, parametrised: bool) -> list[str]:
        """The overrides that make the model of a width.

        Args:
            width: its d_model
            parametrised: whether it has the smallest one as the base of its parametrisation

        Raises:
            ConfigError: a size would not be whole
        """
        sizes = {"d_model": width, **_grown(self.grow, width, self.first, "grow")}
        base = [f"++parametrisation.base={_written({'d_model': self.first, **self.grow})}"] if parametrised else []
        return [*(f"++model.{path}={value}" for path, value in _leaves(sizes)), *base]


def _grown(sizes: Mapping[str, Any], width: int, first: int, path: str) -> dict[str, Any]:
    grown: dict[str, Any] = {}
    for key, value in sizes.items():
        where = f"{path}.{key}"
        if isinstance(value, Mapping):
            grown[key] = _grown(value, width, first, where)
        elif type(value) is not int or value < 1:
            raise ConfigError(where, value, "is a size of the model, which grows with d_model", "Write a whole number")
        elif value * width % first:
            rule = f"would be {value * width / first:g} at width {width}"
            raise ConfigError(where, value, rule, "Choose widths, or sizes at the smallest, that stay whole")
        else:
            grown[key] = value * width // first
    return grown


def _leaves(sizes: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, int]]:
    for key, value in sizes.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _written(sizes: Mapping[str, Any]) -> str:
    """A mapping as Hydra reads it."""
    inner = (f"{k}: {_written(v) if isinstance(v, Mapping) else v}" for k, v in sizes.items())
    return f"{{{', '.join(inner)}}}"


def has_rules(overrides: Sequence[str]) -> bool:
    """Whether overrides choose a parametrisation other than the standard one."""
    node = compose_config(overrides).parametrisation
    return (node if isinstance(node, str) else node.name) != STANDARD["name"]
