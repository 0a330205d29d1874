"""What the rank that prepares the data tells the others: the corpus' fingerprint, or why there is none.

The first rank of each node prepares: nodes may have disks of their own, and where they share one, the lock in
``packing.py`` lets a single node build. The other ranks read no text; they map what has been built.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from registry.errors import ConfigError


@dataclass(frozen=True)
class Word:
    """What one rank knows.

    Args:
        node: number of its machine
        fingerprint: of the corpus; None where this rank has not read it
        failure: why the data could not be prepared on it; None if nothing has failed
    """

    node: int
    fingerprint: str | None = None
    failure: ConfigError | None = None


def are_several() -> bool:
    """Whether this process is one of several that can hear each other."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def as_refusal(error: Exception) -> ConfigError:
    """An error in a form in which it can be sent to other ranks."""
    if isinstance(error, ConfigError):
        return ConfigError(error.path, str(error.value), error.rule, error.remedy)
    rule = f"could not be prepared by rank {dist.get_rank()} ({type(error).__name__}: {error})"
    return ConfigError("data", "corpus", rule, "Look at the first error that this rank has printed")


def exchange(own: Word) -> str | None:
    """Called by all ranks: what each knows, to all.

    Returns:
        the fingerprint that this rank's node works with; None if no rank has read the corpus

    Raises:
        ConfigError: on every rank alike, when one has failed or nodes have read different text
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
