"""Registry: name → class → typed configuration → built object. Knows no block."""

if __name__ != "blockwright.registry":  # the same code under a second name would be a second catalogue
    raise ImportError("registry is a part of blockwright: write `from blockwright import registry`")

from blockwright.registry.build import (
    Node,
    Scope,
    as_written,
    build,
    child_nodes,
    refuse_targets,
    resolve,
    to_plain,
    walk,
)
from blockwright.registry.catalogue import (
    ROOT,
    SETTINGS,
    Composable,
    RegistrationError,
    SameAs,
    families,
    family,
    find_family,
    kinds,
    layer_kinds,
    load,
    lookup,
    names,
    register,
    settings,
)
from blockwright.registry.errors import REFUSED, BlockError, ConfigError, did_you_mean
from blockwright.registry.schema import INHERIT

__all__ = [
    "INHERIT",
    "REFUSED",
    "ROOT",
    "SETTINGS",
    "BlockError",
    "Composable",
    "ConfigError",
    "Node",
    "RegistrationError",
    "SameAs",
    "Scope",
    "as_written",
    "build",
    "child_nodes",
    "did_you_mean",
    "families",
    "family",
    "find_family",
    "kinds",
    "layer_kinds",
    "load",
    "lookup",
    "names",
    "refuse_targets",
    "register",
    "resolve",
    "settings",
    "to_plain",
    "walk",
]
