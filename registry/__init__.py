"""Registry: name → class → typed configuration → built object. Knows no block."""

from registry.build import Scope, as_written, build, refuse_targets, resolve, to_plain, walk
from registry.catalogue import (
    Composable,
    RegistrationError,
    families,
    family,
    kinds,
    layer_kinds,
    load,
    lookup,
    names,
    register,
)
from registry.children import Node, child_nodes
from registry.errors import REFUSED, BlockError, ConfigError, did_you_mean
from registry.fixes import SameAs
from registry.schema import INHERIT

__all__ = [
    "INHERIT",
    "REFUSED",
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
    "kinds",
    "layer_kinds",
    "load",
    "lookup",
    "names",
    "refuse_targets",
    "register",
    "resolve",
    "to_plain",
    "walk",
]
