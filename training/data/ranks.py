"""Exchange between the rank that prepares the data and the others: the corpus's fingerprint, or an error.

The first rank of each node prepares: nodes may have local disks, and where they share one, the lock in ``packing.py``
lets a single node build. The other ranks read no text; they map the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from blockwright.registry.errors import ConfigError


@dataclass(frozen=True)
class Word:
    """One rank's message.

    Args:
        node: index of its machine
        fingerprint: of the corpus; None if this rank has not read it
        failure: why it could not prepare the data; None if it did not fail
    """

    node: int
    fingerprint: str | None = None
    failure: ConfigError | None = None


def are_several() -> bool:
    """Whether this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def as_refusal(error: Exception) -> ConfigError:
    """An error that can be sent to other ranks."""
    if isinstance(error, ConfigError):
        return ConfigError(error.path, str(error.value), error.rule, error.remedy)
    rule = f"could not be prepared by rank {dist.get_rank()} ({type(error).__name__}: {error})"
    return ConfigError("data", "corpus", rule, "See the first error printed by this rank")


def exchange(own: Word) -> str | None:
    """Exchange all ranks' messages; must be called by all ranks.

    Returns:
        the fingerprint used on this rank's node; None if no rank has read the corpus

    Raises:
        ConfigError: on every rank, if one has failed or nodes have read different text
    """
    words: list[Word] = [own] * dist.get_world_size()
    dist.all_gather_object(words, own)
    for word in words:
        if word.failure is not None:
            raise word.failure
    found = {word.fingerprint: word.node for word in reversed(words) if word.fingerprint is not None}
    if len(found) > 1:
        raise ConfigError(
            "data.corpus",
            f"nodes {', '.join(map(str, sorted(found.values())))}",
            "their copies of the text differ, so their ranks would train on different data",
            "Copy the same files to every node",
        )
    return next(iter(found), None)
