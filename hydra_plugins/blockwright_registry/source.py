"""Hydra looks for plug-ins in ``hydra_plugins``, and finds here what registry/hydra.py offers."""

from registry.hydra import RegistrySearchPath, RegistrySource

__all__ = ["RegistrySearchPath", "RegistrySource"]
