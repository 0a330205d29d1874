"""Blocks, presets and the configurations of the user and of plug-ins on Hydra's search path.

Hydra imports this at the start of every application in the environment. It does nothing in those that are not this
project's, and imports the registry when an option of it is asked for.
"""

from __future__ import annotations

import builtins
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin

CONF = Path(__file__).resolve().parents[2] / "blockwright" / "conf"
SCHEME = "blockwright"


class RegistrySource(ConfigSource):
    """Registered blocks and presets as a config source: see registry/hydra.py."""

    @staticmethod
    def scheme() -> str:
        return SCHEME

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        from blockwright.registry import hydra

        return hydra.is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        from blockwright.registry import hydra

        return hydra.maker(config_path) is not None

    def load_config(self, config_path: str) -> ConfigResult:
        from blockwright.registry import hydra

        make = hydra.maker(config_path)
        assert make is not None
        return ConfigResult(self.provider, self.full_path(), make(), {"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> builtins.list[str]:
        from blockwright.registry import hydra

        return hydra.listed(config_path, results_filter)


class RegistrySearchPath(SearchPathPlugin):
    """Appends the folders of the user and of plug-ins, then the registry: this project's own files take precedence."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # Whether the application's own configurations are this project's
        main = (entry.path for entry in search_path.get_path() if entry.provider == "main")
        is_ours = any(path and Path(path.removeprefix("file://")).resolve() == CONF.resolve() for path in main)
        if not is_ours:
            return
        from blockwright.registry import plugins, user_conf

        for folder in user_conf.folders():
            search_path.append(provider=user_conf.PROVIDER, path=f"file://{folder}")
        for folder, owner in plugins.folders(plugins.CONF).items():
            search_path.append(provider=owner, path=f"file://{folder}")
        search_path.append(provider="blockwright", path=f"{SCHEME}://")  # last: a file has defaults, and comments too
