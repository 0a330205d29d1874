"""What a host asks a GPU for: operators one by one, or the kernels of a compiled graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch._guards import TracingContext
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack


class Operations(TorchDispatchMode):
    """Counts the operators that are called, each a launch or more; a view is none."""

    supports_higher_order_operators = True  # FlexAttention is one

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # what is compiled is one operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = getattr(func, "namespace", "") == "prim"  # for a tensor's device
        if TracingContext.try_get() is None and not (asks or getattr(func, "is_view", False)):
            self.count += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def calling(launches: int) -> Iterator[None]:
    """Whatever operators are called within count as so many: a graph that is run as it was traced stands for what the
    compiler made of it."""
    counting = [mode for mode in _get_current_dispatch_mode_stack() if isinstance(mode, Operations)]
    before = [mode.count for mode in counting]
    yield
    for mode, count in zip(counting, before, strict=True):
        mode.count = count + launches
