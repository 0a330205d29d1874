"""A checkpoint folder of many ranks, read where one process has the whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.fabric.plugins import TorchCheckpointIO

from blocks.sharded import is_folder, read_folder


class FolderCheckpoints(TorchCheckpointIO):
    """Lightning's own way with files, and folders read too."""

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if is_folder(Path(str(path))):
            return read_folder(Path(str(path)))
        return super().load_checkpoint(path, map_location or "cpu", weights_only=True)
