"""Format version of saved compositions, and conversion of the older one.

Format 2: null for a child means none. In format 1, which has no version number, it meant "not set", and compositions
were saved with all such nulls filled in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blockwright.registry import catalogue
from blockwright.registry.errors import ConfigError
from blockwright.registry.schema import INHERIT

FORMAT = 2
# A saved composition of format 1 has all of these keys; one written by hand lacks most of them.
OF_FORMAT_1 = {
    *("vocab_size", "d_model", "n_layers", "max_positions", "tie_embeddings", "scale_embeddings", "logit_softcap"),
    *("mtp", "init", "layout", "variants", "overrides"),
}


def current(model: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a composition to the current format: in format 1, nulls for children become ``inherit``.

    Raises:
        ConfigError: an unknown format
    """
    written = model.get("format")
    if written is None and model.keys() >= OF_FORMAT_1:
        return {**{key: _value(key, value) for key, value in model.items()}, "format": FORMAT}
    if written not in (None, FORMAT) or isinstance(written, bool):
        rule = f"is a composition format unknown to this version (its own: {FORMAT})"
        raise ConfigError("model.format", written, rule, "Leave it out, or use the version that saved the composition")
    return dict(model)


def _value(key: str, value: Any) -> Any:
    """Convert the value of a key of the model: a kind's node, its variants, or the overrides."""
    if key == "variants" and isinstance(value, Mapping):
        return {kind: {n: _node(kind, v) for n, v in (named or {}).items()} for kind, named in value.items()}
    if key == "overrides" and isinstance(value, list):
        return [{kind: _node(kind, v) for kind, v in change.items()} for change in value]
    return _node(key, value)


def _node(kind: str, node: Any) -> Any:
    """Convert a node or patch of a kind, whatever its block."""
    if not isinstance(node, Mapping):
        return node
    of_block = [node["name"]] if node.get("name") in catalogue.names(kind) else catalogue.names(kind)
    children = {n: p.child for b in of_block for n, p in catalogue.lookup(kind, b).schema.children.items()}

    def child(key: str, value: Any) -> Any:
        if key not in children:
            return value
        if isinstance(value, list):
            return [_node(str(children[key]), item) for item in value]
        return INHERIT if value is None else _node(str(children[key]), value)

    return {key: child(key, value) for key, value in node.items()}
