"""Places in a composition and in a built decoder, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from blockwright.blocks.attention.recurrent import Recurrent
from blockwright.blocks.decoder import Decoder


def put(model: dict[str, Any], path: str, value: Any) -> None:
    """Set a dotted path of a composition."""
    *parents, last = path.split(".")
    reduce(lambda node, key: node.setdefault(key, {}), parents, model)[last] = value


def show(decoder: Decoder, place: str | Callable[[Decoder], Any]) -> Any:
    """An attribute of a built decoder by its dotted path, or the result of a function.

    The first segment may be ``first`` (layer 0), ``dense`` or ``sparse`` (the first layer without or with routed
    experts), ``full`` or ``linear`` (the first layer whose attention reads all tokens, or remembers a state).

    Raises:
        AttributeError: this decoder has no such attribute
    """
    if callable(place):
        return place(decoder)
    root, _, rest = place.partition(".")
    start = STARTS[root](decoder) if root in STARTS else getattr(decoder, root)
    return reduce(getattr, rest.split(".") if rest else [], start)


def sparse(decoder: Decoder) -> Any:
    """The first layer with routed experts.

    Raises:
        AttributeError: there is none
    """
    return _layer(decoder, routed=True)


def dense(decoder: Decoder) -> Any:
    """The first layer without routed experts.

    Raises:
        AttributeError: there is none
    """
    return _layer(decoder, routed=False)


def full(decoder: Decoder) -> Any:
    """The first layer whose attention reads all tokens, or those of a window.

    Raises:
        AttributeError: there is none
    """
    return _first(decoder, lambda layer: not isinstance(layer.attention, Recurrent))


def linear(decoder: Decoder) -> Any:
    """The first layer whose attention remembers a state of fixed size.

    Raises:
        AttributeError: there is none
    """
    return _first(
        decoder, lambda layer: isinstance(layer.attention, Recurrent) and not getattr(layer.attention, "empty", False)
    )


def _layer(decoder: Decoder, routed: bool) -> Any:
    return _first(decoder, lambda layer: hasattr(layer.ffn, "gating") == routed)


def _first(decoder: Decoder, wanted: Callable[[Any], bool]) -> Any:
    for layer in decoder.layers:
        if wanted(layer):
            return layer
    raise AttributeError("no such layer")


STARTS: dict[str, Callable[[Decoder], Any]] = {
    "first": lambda decoder: decoder.layers[0],
    "dense": dense,
    "sparse": sparse,
    "full": full,
    "linear": linear,
}
