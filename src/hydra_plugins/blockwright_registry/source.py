"""Hydra discovers plug-ins in ``hydra_plugins``; this one is implemented in registry/hydra.py."""

from blockwright.registry.hydra import RegistrySearchPath, RegistrySource

__all__ = ["RegistrySearchPath", "RegistrySource"]
