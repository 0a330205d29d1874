"""The names: name → class → typed configuration → built object. Knows no block."""

from registry.build import Node, Scope, build, refuse_targets, resolve, to_plain
from registry.catalogue import Composable, RegistrationError, family, kinds, load, lookup, names, register
from registry.errors import REFUSED, BlockError, ConfigError, did_you_mean

__all__ = [
    "REFUSED",
    "BlockError",
    "Composable",
    "ConfigError",
    "Node",
    "RegistrationError",
    "Scope",
    "build",
    "did_you_mean",
    "family",
    "kinds",
    "load",
    "lookup",
    "names",
    "refuse_targets",
    "register",
    "resolve",
    "to_plain",
]
