"""``init_from=RUN``: copy the weights of a run, a checkpoint or an imported folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from blockwright import registry
from blockwright.blocks.checkpoint.source import check_init, load_part, load_weights, read_origin, read_start
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError, register
from blockwright.training.checkpoints.record import Change, listed, past_of, weight_changes
from blockwright.training.starts.base import Start, Text, options

# --- changes of the model: positions alone are accepted ---------------------------------------------------------------


POSITION = "position"
SHAPE_OF_ROTATION = ("pairing", "rotary_fraction")  # which numbers of a query are rotated together


def check_swaps(there: Mapping[str, Any], here: Mapping[str, Any], start: str, allowed: bool) -> list[str]:
    """Compare the composition that weights were trained in with the one that they are put into.

    Another rotary position block is an extension of the context, and accepted; so is another base (``theta``) for
    ``rope`` itself. What a stretching block counts from, its base, must be the trained one, and the dimensions that are
    rotated together must stay, or the weights mean nothing.

    Args:
        there: complete composition of the weights
        here: that of the model they start
        start: where the weights come from, as written
        allowed: whether other changes were asked for: then they are warned about

    Returns:
        lines about what changes

    Raises:
        ConfigError: at the position's parameter, or at ``init_from`` for any other change
    """
    lines: list[str] = []
    others: list[Change] = []
    for change in weight_changes(there, here):
        pair = _position(change.path, there, here)
        if pair is None:
            others.append(change)
        else:
            lines += _judge(*pair)
    if others and not allowed:
        rule = f"was trained with a model to which its weights mean something else: {listed(others)}"
        remedy = "Add model=pretrained to take the composition from there, or write resume.changed=allow"
        raise ConfigError("init_from", start, rule, remedy)
    if others:
        lines.append(f"the weights of {start} mean something else here: {listed(others, most=8)}")
    return list(dict.fromkeys(lines))


def _position(path: str, there: Any, here: Any) -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """The path and the nodes of the position block that a change is in; None for any other change."""
    parts = path.split(".")
    if POSITION not in parts:
        return None
    parts = parts[: parts.index(POSITION) + 1]
    old, new = (_at(tree, parts[1:]) for tree in (there, here))
    if old is None or new is None:
        return None
    return ".".join(parts), old, new


def _at(tree: Any, keys: list[str]) -> dict[str, Any] | None:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    node = {"name": tree} if isinstance(tree, str) else tree
    return _complete(node) if isinstance(node, Mapping) and "name" in node else None


def _complete(node: Mapping[str, Any]) -> dict[str, Any]:
    """A position's node with its defaults."""
    schema = registry.lookup(POSITION, node["name"]).schema
    return {**{name: p.default for name, p in {**schema.parameters, **schema.fixed}.items()}, **node}


def _judge(path: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    names = f"{old['name']} → {new['name']}"
    rotary = [all(key in node for key in ("theta", *SHAPE_OF_ROTATION)) for node in (old, new)]
    if not all(rotary):
        yield f"{path} was {old['name']}, is {new['name']}: the weights have never seen such positions"
        return
    for key in SHAPE_OF_ROTATION:
        if old[key] != new[key]:
            rule = f"is {old[key]} in the trained weights, whose queries and keys would be rotated in other pairs"
            raise ConfigError(f"{path}.{key}", new[key], rule, f"Write {path}.{key}={old[key]}")
    if old["theta"] != new["theta"] and new["name"] != "rope":
        rule = f"is {old['theta']:g} in the trained weights, and {new['name']} stretches from that base"
        remedy = f"Write {path}.theta={old['theta']:g}; to change the base itself use model/position=rope"
        raise ConfigError(f"{path}.theta", new["theta"], rule, remedy)
    base = "" if old["theta"] == new["theta"] else f", theta {old['theta']:g} → {new['theta']:g}"
    factor = f", factor {new['factor']:g}" if "factor" in new else ""
    yield f"positions: {names}{base}{factor}"


def changed_window(model: Mapping[str, Any], trained: Any) -> str | None:
    """A warning where a position block stretches from another length than that of training.

    Args:
        model: composition, of which the model's own position block is looked at
        trained: tokens of a window of the training that the weights come from, if known
    """
    node = _at(model, [POSITION])
    told = node.get("original_positions") if node else None
    if not isinstance(trained, int) or told is None or told == trained:
        return None
    return f"warning: model.position.original_positions is {told}, but the weights were trained on windows of {trained}"


@register("start", "init_from")
class Trained(Start):
    """The weights of a trained model whose composition has the same names and shapes."""

    def __init__(self, init_from: str) -> None:
        self.trained, self.folder = init_from, Path(init_from)

    def compare(self, there: Mapping[str, Any], here: Mapping[str, Any], allowed: bool) -> list[str]:
        lines = check_swaps(there, here, str(self.trained), allowed)
        return [f"starts from {self.trained}; " + "; ".join(lines)] if lines else []

    def check(self, model: Mapping[str, Any]) -> list[str]:
        try:
            check_init(self.folder, model)
        except ConfigError as error:
            raise ConfigError(error.path, error.value, error.rule, f"{error.remedy}{_or_derive()}") from None
        if not (checkpoint := read_start(self.folder)):
            return []
        trained = (past_of(checkpoint).settings.get("data") or {}).get("sequence_length")
        line = changed_window(model, trained)
        return [f"starts from {self.trained}; {line}"] if line else []

    def fill(self, decoder: Decoder, text: Text) -> None:
        load_weights(decoder, self.folder)

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        load_part(part, self.folder, prefix)

    def origin(self) -> dict[str, Any]:
        return read_origin(self.folder)


def _or_derive() -> str:
    """What else to write where weights do not fit: the starts that derive them."""
    return "".join(f", or {option} to derive these weights" for option in options(lambda start: start.derives))
