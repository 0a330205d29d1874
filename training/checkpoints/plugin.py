"""Lightning's CheckpointIO with atomic, sealed, data-only files."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch.utils._pytree import tree_map_only

from blockwright.blocks.checkpoint.read import read_file
from blockwright.blocks.checkpoint.sharded import is_folder, read_folder
from blockwright.training.checkpoints.atomic import write_file


class SealedCheckpoints(CheckpointIO):
    """Writes checkpoint files atomically with a digest, and reads nothing but tensors and plain types.

    How this differs from Lightning's: that one stages the file in ``$TMPDIR`` and copies it, so a kill or a full disk
    leaves half of it; and it unpickles files from ``http`` addresses without restriction.

    Args:
        asynchronous: copy the state and write it in a thread while training continues. Costs memory for a copy of the
            state; a save waits for the previous one
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self._writer: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            ConfigError: it, or the previous one, could not be written
        """
        self.wait()
        if not self.asynchronous:
            write_file(checkpoint, Path(path))
            return
        copied = tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), checkpoint)
        self._writer = self._writer or ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing = self._writer.submit(write_file, copied, Path(path))

    def wait(self) -> None:
        """Wait for the checkpoint being written.

        Raises:
            ConfigError: it cannot be written
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read a checkpoint, always with ``weights_only``.

        Raises:
            ConfigError: a URL, no such file, damaged, or more than tensors and plain types
        """
        self.wait()
        if is_folder(Path(path)):
            return read_folder(Path(path))
        return read_file(
            path, map_location=map_location or "cpu"
        )  # not memory-mapped: optimizers may keep these tensors

    def remove_checkpoint(self, path: str | Path) -> None:
        self.wait()
        if Path(path).is_dir():
            shutil.rmtree(path)
        else:
            Path(path).unlink(missing_ok=True)

    def teardown(self) -> None:
        try:
            self.wait()
        finally:
            if self._writer is not None:
                self._writer.shutdown()
                self._writer = None
