"""The digests of a folder that many ranks have written: each rank reads what it wrote, all at the same time.

So the time that ranks wait for one another is that of one rank's share, however large the checkpoint, and stays far
below the timeout of a process group.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from blocks.checkpoint import manifest

_WRITTEN_BY = re.compile(r"__(\d+)_")  # how torch.distributed.checkpoint names a rank's files


def seal(folder: Path) -> manifest.Digests:
    """Digest a folder's files; to be called on all ranks when all have written.

    Returns:
        of every file, on every rank

    Raises:
        OSError: a rank cannot read its files; on all ranks
    """
    _, ranks = _place()
    if ranks > 1:
        dist.barrier()
    parts = _exchange(lambda: dict(manifest.digests_of(folder, _mine(manifest.files_of(folder)))))
    return {name: told for part in parts for name, told in part.items()}


def check(folder: Path) -> None:
    """Hold a folder to its manifest, if it has one; to be called on all ranks.

    Raises:
        Damaged: it is not what was written; on all ranks
        OSError: a rank cannot read it; on all ranks
    """

    def check_share() -> None:
        if (folder / manifest.MANIFEST).is_file():
            digests = manifest.read_manifest(folder)
            manifest.check_files(folder, {name: digests[name] for name in _mine(digests)})

    _exchange(check_share)


def _mine(names: Iterable[str]) -> list[str]:
    """The files that this rank reads: what it wrote, where a name says so; others are dealt out."""
    rank, ranks = _place()
    mine = []
    for i, name in enumerate(sorted(names)):
        written = _WRITTEN_BY.match(Path(name).name)
        if (int(written[1]) if written else i) % ranks == rank:
            mine.append(name)
    return mine


def _exchange(work: Callable[[], Any]) -> list[Any]:
    """What ``work`` returns on each rank; where it raises on one, that is raised on all."""
    _, ranks = _place()
    if ranks == 1:
        return [work()]
    own: tuple[Any, OSError | tuple[str, str] | None]
    try:
        own = (work(), None)
    except manifest.Damaged as error:
        own = (None, (str(error.path), error.reason))
    except OSError as error:
        own = (None, OSError(error.errno, error.strerror, str(error.filename)))
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
