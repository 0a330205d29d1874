"""Nodes with Hydra's ``_target_`` as nodes with Lightning CLI's ``class_path`` and ``init_args``, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HYDRA_ONLY = ("_target_", "_convert_", "_recursive_")


def to_class_paths(node: Any) -> Any:
    """Plain values with ``class_path`` and ``init_args`` in place of ``_target_``, at every depth."""
    if isinstance(node, list):
        return [to_class_paths(inner) for inner in node]
    if not isinstance(node, Mapping):
        return node
    inner = {key: to_class_paths(below) for key, below in node.items() if key not in HYDRA_ONLY}
    return {"class_path": node["_target_"], "init_args": inner} if "_target_" in node else inner


def to_targets(node: Any) -> Any:
    """Plain values with ``_target_`` in place of ``class_path`` and ``init_args``, at every depth.

    Keys beside these two are arguments too, so that none is dropped unseen.
    """
    if isinstance(node, list | tuple):
        return [to_targets(inner) for inner in node]
    if not isinstance(node, Mapping):
        return node
    inner = {key: to_targets(below) for key, below in node.items()}
    if "class_path" not in inner:
        return inner
    target, arguments = inner.pop("class_path"), inner.pop("init_args", None) or {}
    return {"_target_": target, **arguments, **inner}
