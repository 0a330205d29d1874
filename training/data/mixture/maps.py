"""Files of numbers, mapped when they are first read, and a limited number at once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MOST = 256  # mapped at once, in each process: systems limit open files


@functools.lru_cache(maxsize=MOST)
def mapped(path: Path, dtype: str, offset: int, n: int) -> npt.NDArray[Any]:
    """The n numbers of a file after ``offset`` bytes, read-only."""
    return np.memmap(path, dtype, "r", offset, (n,)).view(np.ndarray)  # slicing a memmap itself costs 10 µs
