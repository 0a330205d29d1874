"""Compare what two decoders compute, without running them.

Compositions are compared as built, on the meta device: different texts (a default written out, ``mha`` for ``gqa``
with as many heads, a number in a variant) may build the same model.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from blockwright.blocks.decoder import Decoder

# Attributes and children without effect on what a trained model computes.
TRAINING = {"training", "bias_step", "bias_until", "loss_weight"}
OF_TRAINING = {"balance", "dropping"}


def traits(decoder: Decoder) -> dict[str, Any]:
    """Everything but the weights that determines a decoder's output: classes, numbers, shapes."""
    found: dict[str, Any] = {}
    for name, module in decoder.named_modules():
        if OF_TRAINING & set(name.split(".")):
            continue
        found[name] = _computes(module)
        for attribute, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str | tuple)
            if plain and not attribute.startswith("_") and attribute not in TRAINING:
                found[f"{name}.{attribute}"] = value
    return {**found, **{k: tuple(v.shape) for k, v in decoder.state_dict().items()}}


def _computes(module: nn.Module) -> str:
    """The class whose methods run: a subclass that only defines a constructor computes what its parent does.

    ``forward`` alone is not enough: gates differ in ``choose``, positions in ``rotate``.
    """
    owner = next(cls for cls in type(module).__mro__ if any(_is_method(k, v) for k, v in vars(cls).items()))
    return f"{owner.__module__}.{owner.__qualname__}"


def _is_method(name: str, value: object) -> bool:
    return isinstance(value, FunctionType | property) and name not in ("__init__", "parallel_plan")


def difference(a: Decoder, b: Decoder) -> str | None:
    """The first difference between two decoders, as text; None if they compute the same."""
    ours, theirs = traits(a), traits(b)
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            return f"{key or 'decoder'}: {ours.get(key)} here, {theirs.get(key)} there"
    return None
