"""Log-probabilities of preferences under a reference policy, on disk: named by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockwright.blocks.checkpoint.sharded import is_folder
from blockwright.blocks.checkpoint.source import checkpoint_of
from blockwright.registry.replacing import replaced

Logs = dict[str, Tensor]  # split → [pairs, 2], of the chosen and the rejected answer


def digest_of(start: Path, changes: Sequence[Any] = ()) -> str:
    """A digest of the files of weights in a run, a checkpoint or an imported folder.

    Args:
        start: the run, the checkpoint or the folder
        changes: as plain types, what else decides what the reference computes

    Raises:
        ConfigError: at ``init_from``: there are none
    """
    found = checkpoint_of(start)
    folder = start if found is None else found if is_folder(found) else None
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else [found]
    digest = hashlib.sha256()
    for path in files:
        assert path is not None
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    if changes:
        digest.update(json.dumps(changes, sort_keys=True).encode())
    return digest.hexdigest()


def place(folder: Path, weights: str, pairs: str, precision: str) -> Path:
    """The file of log-probabilities.

    Args:
        folder: of all of them
        weights: digest of the reference
        pairs: digest of the data
        precision: of the forward pass, as the trainer names it
    """
    key = hashlib.sha256(json.dumps(["reference 1", weights, pairs, precision]).encode()).hexdigest()[:32]
    return folder / f"reference-{key}.npz"


def read(file: Path) -> Logs | None:
    """The log-probabilities in a file; None if there is none, or it is damaged."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            return {split: torch.from_numpy(stored[split]) for split in stored.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def write(file: Path, logs: Logs) -> None:
    """Write a file atomically."""
    arrays: dict[str, Any] = {split: values.cpu().numpy() for split, values in logs.items()}
    with replaced(file) as partial, partial.open("wb") as stream:  # to a path NumPy would add .npz
        np.savez(stream, **arrays)
