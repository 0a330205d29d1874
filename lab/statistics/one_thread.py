"""Linear algebra of small matrices on one thread: several wait for each other, most of all on a busy machine.

The inverse of 144 rows took 150 ms on two threads beside two trainings, and 2 ms on one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def on_one_thread(function: Callable[P, R]) -> Callable[P, R]:
    """The function with one thread for NumPy's and SciPy's products, and as many as before after it."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        import scipy.linalg  # noqa: F401  (its own library, which is limited only once it is loaded)
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, "blas"):
            return function(*args, **kwargs)

    return run
