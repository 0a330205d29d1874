"""The sizes of a parallel run, and its exchange by name.

Imports nothing heavy: both are refused before a process starts.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockwright.registry import ConfigError, did_you_mean

if TYPE_CHECKING:
    from blockwright.training.parallel.exchange import Exchange

STRATEGY = "blockwright.training.parallel.strategy.Parallel"
AUTO = "auto"


@dataclass(frozen=True)
class Sizes:
    """A grid of ranks, slowest index first: replicate, shard, context, tensor.

    Args:
        replicate: copies of the sharded model (HSDP), whose gradients are averaged
        shard: ranks with different windows, over which, times ``context``, FSDP2 shards weights, gradients and
            optimizer state
        tensor: adjacent ranks that split heads and hidden widths, and read the same tokens
        expert: size of the groups of adjacent ``shard`` × ``context`` ranks that share the experts
        context: ranks that split the tokens of the same windows
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1

    @property
    def world(self) -> int:
        return self.replicate * self.sharing * self.tensor

    @property
    def sharing(self) -> int:
        """Ranks that share the weights, by FSDP2."""
        return self.shard * self.context

    @property
    def data(self) -> int:
        """Ranks that read different windows."""
        return self.replicate * self.shard


def sizes_of(strategy: Mapping[str, Any], world: int, path: str = "trainer.strategy") -> Sizes:
    """The sizes that a strategy's arguments mean for a world size.

    Raises:
        ConfigError: they are not positive integers, or do not match the world size
    """
    given = {name: strategy.get(name, AUTO if name == "shard" else 1) for name in Sizes.__dataclass_fields__}
    for name, value in given.items():
        is_auto = name == "shard" and value == AUTO
        if not is_auto and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            rule = "must be a positive number of ranks" + (", or auto for all that are left" * (name == "shard"))
            raise ConfigError(f"{path}.{name}", value, rule, f"Write {path}.{name}=1 for none")
    taken = given["replicate"] * given["context"] * given["tensor"]
    if given["shard"] == AUTO:
        if world % taken:
            name = next((n for n in ("context", "tensor") if given[n] > 1), "replicate")
            rule = f"{_product(given)} = {taken} ranks do not divide the world of {world} (devices × num_nodes)"
            raise ConfigError(f"{path}.{name}", given[name], rule, "Choose divisors, or other trainer.devices")
        given["shard"] = world // taken
    sizes = Sizes(**given)
    if sizes.world != world:
        rule = (
            f"{_product(given, 'shard')} = {sizes.world} ranks do not fill the world of {world} (devices × num_nodes)"
        )
        raise ConfigError(
            f"{path}.shard", sizes.shard, rule, f"Write {path}.shard=auto, or trainer.devices={sizes.world}"
        )
    if sizes.sharing % sizes.expert:
        among = "shard" if sizes.context == 1 else "shard × context"
        rule = f"experts are shared by the {among} ranks, so it must divide their number ({sizes.sharing})"
        divisors = [n for n in range(1, sizes.sharing + 1) if sizes.sharing % n == 0]
        raise ConfigError(f"{path}.expert", sizes.expert, rule, f"Choose one of {', '.join(map(str, divisors))}")
    return sizes


def _product(given: Mapping[str, Any], *more: str) -> str:
    """The sizes whose product is meant, by name; ``context`` only where there is any."""
    named = ("replicate", *more, *(("context",) if given["context"] > 1 else ()), "tensor")
    return " × ".join(named)


CLASSES = {"all_to_all": "AllToAll", "deep_ep": "DeepEP"}  # of exchange.py
NEEDS = {"deep_ep": "deep_ep"}  # packages, none of them on the package index
PATH = "trainer.strategy.exchange"


def check_exchange(name: Any) -> None:
    """Refuse a name that no exchange has, or one whose package is not installed.

    Raises:
        ConfigError
    """
    if name not in CLASSES:
        raise ConfigError(PATH, name, "there is no such exchange", did_you_mean(str(name), CLASSES))
    package = NEEDS.get(name)
    if package is not None and importlib.util.find_spec(package) is None:
        remedy = "Build it from github.com/deepseek-ai/DeepEP, or write all_to_all"
        raise ConfigError(PATH, name, f"the package {package} is not installed", remedy)


def exchange_of(name: str) -> type[Exchange]:
    """The class.

    Raises:
        ConfigError: as ``check_exchange``
    """
    check_exchange(name)
    found: type[Exchange] = getattr(importlib.import_module("blockwright.training.parallel.exchange"), CLASSES[name])
    return found
