"""Faults put in on purpose: a check that does not see them sees nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from blockwright.blocks.decoder import Decoder
from tests.absent_gpu.cases import Attention


def number_read(ffn: Any, given: Any, got: tuple[Tensor, Any]) -> None:
    """The host waits for the device."""
    got[0].sum().item()


def graph_broken(ffn: Any, given: Any, got: tuple[Tensor, Any]) -> None:
    """The compiler cannot see past this."""
    torch._dynamo.graph_break()


HOOKS: dict[str, Callable[..., None]] = {"number_read": number_read, "graph_broken": graph_broken}
TOO_WIDE = Attention((512, 512), (4, 4), ("softcap",))  # no tile of such heads fits into shared memory


@contextmanager
def groups_kept() -> Iterator[None]:
    """Groups of heads reach torch's kernels in calls that only those without groups take."""
    with patch("blockwright.blocks.kernels.attention.as_efficient_takes", lambda call: call):
        yield


def plant(name: str) -> Callable[[Decoder], None]:
    """Lets the first layer's ffn do it at each call."""

    def put(decoder: Decoder) -> None:
        decoder.layers[0].ffn.register_forward_hook(HOOKS[name])  # type: ignore[union-attr]

    return put
