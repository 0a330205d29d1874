"""A limit on the memory that foreign code may take."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STATM = Path("/proc/self/statm")
_one = threading.Lock()  # the limit is the process's: two at once would each restore the other's


@contextmanager
def memory_limit(n_bytes: int) -> Iterator[None]:
    """Make allocations fail, with ``MemoryError``, that exceed the process's memory by some bytes.

    Other threads have the same limit meanwhile; code that allocates too much fails at its own large allocation. Systems
    without /proc have no limit.

    Args:
        n_bytes: of address space, beside what the process has at the start
    """
    if not STATM.is_file():
        yield
        return
    with _one:
        before = resource.getrlimit(resource.RLIMIT_AS)
        wanted = int(STATM.read_text().split()[0]) * resource.getpagesize() + n_bytes
        limits = [limit for limit in (wanted, *before) if limit != resource.RLIM_INFINITY]
        resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
