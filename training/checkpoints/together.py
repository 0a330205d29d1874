"""A folder written by many ranks: each rank digests what it wrote, at the same time, and one's failure is all ranks'.

So ranks wait for each other only as long as one rank's share takes, far below the timeout of a process group, however
large the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from blockwright.blocks.checkpoint import manifest
from blockwright.registry.errors import os_error_of

_WRITTEN_BY = re.compile(r"__(\d+)_")  # torch.distributed.checkpoint's file names


def seal(folder: Path) -> manifest.Digests:
    """Digest a folder's files; must be called on all ranks when all have written.

    Returns:
        the digest of every file, on every rank

    Raises:
        OSError: a rank cannot read its files; raised on all ranks
    """
    _, ranks = _place()
    if ranks > 1:
        dist.barrier()
    parts = _exchange(lambda: dict(manifest.digests_of(folder, _mine(manifest.files_of(folder)))))
    return {name: digest for part in parts for name, digest in part.items()}


def check(folder: Path) -> None:
    """Verify a folder against its manifest, if it has one; must be called on all ranks.

    Raises:
        Damaged: it differs from what was written; raised on all ranks
        OSError: a rank cannot read it; raised on all ranks
    """

    def check_share() -> None:
        if (folder / manifest.MANIFEST).is_file():
            digests = manifest.read_manifest(folder)
            manifest.check_files(folder, {name: digests[name] for name in _mine(digests)})

    _exchange(check_share)


def on_first(work: Callable[[], object]) -> None:
    """Let rank 0 work; must be called on all ranks, which wait for it.

    Raises:
        Damaged, OSError: what it has failed with; raised on all ranks, which would wait in vain otherwise
    """
    _exchange(work if _place()[0] == 0 else lambda: None)


def _mine(names: Iterable[str]) -> list[str]:
    """The files that this rank reads: those it wrote, by their names, and a share of the others."""
    rank, ranks = _place()
    mine = []
    for i, name in enumerate(sorted(names)):
        written = _WRITTEN_BY.match(Path(name).name)
        if (int(written[1]) if written else i) % ranks == rank:
            mine.append(name)
    return mine


def _exchange(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns on each rank; an exception on one rank is raised on all."""
    _, ranks = _place()
    if ranks == 1:
        return [work()]
    own: tuple[Any, OSError | tuple[str, str] | None]
    try:
        own = (work(), None)
    except manifest.Damaged as error:
        own = (None, (str(error.path), error.reason))
    except (OSError, RuntimeError) as error:
        if (found := os_error_of(error)) is None:
            raise
        own = (None, OSError(found.errno, found.strerror, str(found.filename)))
    all_of_them: list[Any] = [None] * ranks
    dist.all_gather_object(all_of_them, own)
    for _, failure in all_of_them:
        if isinstance(failure, OSError):
            raise failure
        if failure is not None:
            raise manifest.Damaged(Path(failure[0]), failure[1])
    return [outcome for outcome, _ in all_of_them]


def _place() -> tuple[int, int]:
    """(rank, number of ranks) of this process."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
