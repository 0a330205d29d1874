"""Copy a good checkpoint to another folder, when a run resumes in a new folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from blockwright.registry.replacing import replaced
from blockwright.training.checkpoints.atomic import partial_of


def carry(old: Path, new: Path) -> None:
    """Make ``new`` the same checkpoint as ``old``, by hard links if possible, else copies, atomically.

    Raises:
        OSError: there is no ``old``, or ``new`` cannot be written
    """
    if new.exists() and old.resolve() == new.resolve():
        return
    new.parent.mkdir(parents=True, exist_ok=True)
    with replaced(new, partial_of(new)) as partial:
        if old.is_dir():
            shutil.copytree(old, partial, copy_function=_link)
        else:
            _link(old, partial)


def _link(old: Path | str, new: Path | str) -> None:
    try:
        os.link(old, new)  # checkpoints are replaced, never modified, so two names may share one
    except OSError:
        shutil.copyfile(old, new)
