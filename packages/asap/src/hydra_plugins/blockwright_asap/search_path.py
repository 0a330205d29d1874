"""Put this package's configurations on Hydra's search path: behind Blockwright's files, before its registry."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class AsapSearchPath(SearchPathPlugin):
    """Hydra calls this for every program; where no experiment of ASAP is named, nothing changes."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        own = {"provider": "blockwright-asap", "path": "pkg://blockwright_asap.conf"}
        search_path.prepend(
            **own, anchor="blockwright"
        )  # a registered name has defaults, and its file has comments too
