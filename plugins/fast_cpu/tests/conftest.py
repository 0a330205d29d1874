"""The libraries in C, for vectors of every width that this processor has."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from blockwright.plugins.fast_cpu import c_library, codes, decoding, few_rows, few_tokens

SOURCES = Path(c_library.__file__).parent
OPTIONS = {"as here": [], "of eight": ["-march=x86-64-v3"], "of four": ["-march=x86-64"]}


@cache
def built(name: str, *options: str) -> ctypes.CDLL:
    return c_library._built(SOURCES / f"{name}.c", "gcc", ["-fopenmp", *options])


def forget() -> None:
    for found in (decoding._library, few_rows._library, codes.library):
        found.cache_clear()


@pytest.fixture(params=["as here", *(pytest.param(of, marks=pytest.mark.slow) for of in ("of eight", "of four"))])
def vectors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Everything in C is computed with vectors of some width."""
    options = OPTIONS[request.param]
    if c_library.loaded("decoding") is None or (options and platform.machine() != "x86_64"):
        pytest.skip("no C compiler here, or another kind of processor")
    if request.param == "of eight" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("no such vectors here")
    for module in (decoding, few_rows, few_tokens, codes):
        if options:
            monkeypatch.setattr(module, "loaded", lambda name: built(name, *options))
    forget()
    yield
    forget()
