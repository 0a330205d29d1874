"""Recognise the error of a rank whose peer has gone: its own state on disk is good, so it counts as stopped.

torch has no common class for it. NCCL and the store raise subclasses of ``DistError``, gloo a ``RuntimeError``.
"""

from __future__ import annotations

import re

WORDS = re.compile(
    r"connection (closed|reset) by peer|connection was likely closed|connectFullMesh failed|broken pipe"
    r"|socket (timeout|closed)|remote process exited|ncclRemoteError|ncclSystemError|NCCL communicator was aborted"
    r"|watchdog.*timeout|timed out waiting \d+ms for (recv|send)|rank \d+ (has|is) (terminated|lost)"
    r"|store.*(closed|timed? ?out)",
    re.IGNORECASE,
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that another rank has gone."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        named = {cls.__name__ for cls in type(cause).__mro__}
        if named & {"DistNetworkError", "DistStoreError"}:
            return True
        if "RuntimeError" in named and WORDS.search(str(cause)):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
