"""Atomic checkpoint files: the previous one stays until the new one has been verified.

A checkpoint is written beside its final path (a rename is atomic within one file system only), synced, read back, and
renamed. ``last.ckpt`` keeps its predecessor as ``last.previous.ckpt``. A kill leaves at most a ``.partial``, which the
next start removes; a lock shows whether its writer has ended (see training/claims.py, also for NFS).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from blockwright.blocks.checkpoint import manifest
from blockwright.registry import ConfigError
from blockwright.registry.errors import os_error_of
from blockwright.training.checkpoints.find import LAST, PREVIOUS
from blockwright.training.claims import OWNER, claimed, forget, is_abandoned, new_owner, remove_old_locks

# --- a folder that many ranks write: each digests its part, and a failure of one is that of all -----------------------


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


def check_together(folder: Path) -> None:
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


_LEFT = re.compile(
    rf"\..+?(?:\.({OWNER})|-\d+)\.(?:partial|old)(?:\.|\Z)"
)  # a strategy may append to it; -1234 is older


def write_file(checkpoint: dict[str, Any], path: Path) -> None:
    """Save a checkpoint as one sealed file.

    A path of ``partial_of`` is written as it is: who made it has claimed it, and puts it in place.

    Raises:
        ConfigError: no space left, or it cannot be written for another reason; the file at ``path`` is intact
    """
    if _owner_of(path):
        _seal(checkpoint, path)
        return
    partial = partial_of(path)
    with refused_if_unwritable(path, partial):
        _seal(checkpoint, partial)
        put_in_place(partial, path)


def _seal(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        sealing = manifest.Sealing(file)
        torch.save(checkpoint, sealing)  # type: ignore[arg-type] # it asks for write and flush only
        sealing.seal()
        file.flush()
        os.fsync(file.fileno())
        _forget_cached(file.fileno())


def put_in_place(partial: Path, path: Path, verify: bool = True) -> None:
    """Verify what has been written, and rename it to ``path``.

    Args:
        partial: a sealed file or folder, in the folder of ``path``
        path: final path; an existing ``last.ckpt`` is kept as the previous one, any other file replaced
        verify: whether to read it back; a folder's digests already come from reading it back

    Raises:
        Damaged: it differs from what was written; nothing has been renamed
        OSError
    """
    if verify:
        manifest.check(partial)
    owner = _owner_of(partial) or new_owner()
    old = path.with_name(f".{path.name}.{owner}.old")
    if path.exists() and (path.name == LAST or path.is_dir() or partial.is_dir()):
        _set_aside(path, old, link=path.is_file() and partial.is_file())
    os.replace(partial, path)
    if path.name == LAST and old.exists():
        previous = path.with_name(PREVIOUS)
        if previous.is_dir() or old.is_dir():  # a folder cannot be replaced atomically
            _set_aside(previous, trash := previous.with_name(f".{PREVIOUS}.{owner}.old"))
            os.replace(old, previous)
            _remove(trash)
        else:
            os.replace(old, previous)
    _remove(old)
    manifest.sync(path.parent)


def _set_aside(path: Path, old: Path, link: bool = False) -> None:
    """Rename what is at ``path``, or hard-link it so that the path never disappears."""
    _remove(old)
    if not path.exists():
        return
    if link:
        try:
            os.link(path, old)
            return
        except OSError:  # no hard links on this file system
            pass
    os.replace(path, old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()


def partial_of(path: Path) -> Path:
    """The temporary path of a checkpoint: beside it, unique for each call."""
    return path.with_name(f".{path.name}.{new_owner()}.partial")


def _owner_of(path: Path) -> str | None:
    left = _LEFT.match(path.name)
    return left[1] if left else None


@contextmanager
def refused_if_unwritable(path: Path, partial: Path, owns: bool = True) -> Iterator[None]:
    """Turn errors of a full or broken disk into a ConfigError, and remove an incomplete checkpoint.

    Within this context, ``clean`` in other processes keeps the partial file.

    Args:
        path: of the checkpoint
        partial: its temporary path
        owns: whether this process claims the partial file and removes its remains

    Raises:
        ConfigError
    """
    claim = ExitStack()
    try:
        if owns:
            path.parent.mkdir(parents=True, exist_ok=True)
            claim.enter_context(claimed(partial.parent, _owner_of(partial) or new_owner()))
        yield
    except manifest.Damaged as error:
        reason = f"what was read back differs from what was written: {error.reason}"
        raise ConfigError("checkpoint", str(path), reason, "Check the disk, or set paths.log_dir elsewhere") from None
    except (OSError, RuntimeError) as error:
        if (found := os_error_of(error)) is None:
            raise
        rule = f"cannot be written ({found.strerror or found})"
        remedy = "Make room or set paths.log_dir elsewhere; checkpoints written before are intact"
        raise ConfigError("checkpoint", str(path), rule, remedy) from None
    finally:
        if owns:
            for left in partial.parent.glob(f"{glob.escape(partial.name)}*"):  # a strategy may append to its name
                _remove(left)
        claim.close()


def _forget_cached(descriptor: int) -> None:
    """Drop the file from the page cache, where possible, so that reading it back reads the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def clean(folder: Path) -> list[Path]:
    """Remove what killed processes have left of the runs in a folder.

    A ``.old`` is a good checkpoint that was being replaced: it is restored unless its path is taken.

    Returns:
        the paths removed or restored
    """
    return [path for checkpoints in folder.glob("*/checkpoints") for path in clean_folder(checkpoints)]


def clean_folder(checkpoints: Path) -> list[Path]:
    """``clean`` for one folder of checkpoints."""
    left = [path for path in checkpoints.glob(".*") if _LEFT.match(path.name)]
    found = [path for path in left if is_abandoned(path, _owner_of(path))]
    for path in found:
        place = path.with_name(LAST)
        if path.suffix == ".old" and path.name.startswith(f".{LAST}.") and not place.exists():
            os.replace(path, place)
        _remove(path)
        forget(path.parent, _owner_of(path))
    remove_old_locks(checkpoints)
    return found
