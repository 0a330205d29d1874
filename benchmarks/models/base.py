"""The interface of an implementation in a race: a training loss, and decoding with a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from benchmarks.race import Contender
from benchmarks.shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(ABC):
    """One implementation, with random weights.

    Attributes:
        module: the nn.Module with the parameters
        note: the setting chosen by measurement, as text; empty for none
    """

    module: Any
    note: str = ""

    @abstractmethod
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token loss of [B,T] tokens and targets, as the library's own training computes it."""

    def choices(self, decoding: bool = False) -> list[str]:
        """The library's settings to try for the fastest; none by default."""
        return []

    def choose(self, choice: str) -> None:
        """Set one of ``choices``."""
        raise NotImplementedError

    def compile(self) -> None:
        """Apply torch.compile to the model."""
        self.module.compile()

    # ---- decoding ----

    def begin(self, batch: int, length: int) -> None:
        """Create an empty cache for ``length`` tokens per row."""
        raise NotImplementedError

    def prefill(self, tokens: Tensor) -> Tensor:
        """Read a prompt [B,T] into the cache; the logits after its last token, [B,V]."""
        raise NotImplementedError

    def fill(self, context: int) -> None:
        """Fill the cache with random values as if ``context`` tokens had been read: a step takes the same time."""
        raise NotImplementedError

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per row, [B,1]; the logits after it, [B,V]."""
        raise NotImplementedError

    def cache_bytes(self) -> int:
        """Bytes of the cache now."""
        raise NotImplementedError


def build(contender: Contender, shape: Shape, dtype: str, device: str, seed: int = 0) -> Model:
    """Build a contender's model; only here its library is imported.

    Raises:
        ImportError: the library is not installed
    """
    torch.manual_seed(seed)
    if contender.maker == "ours":
        from benchmarks.models.blockwright import Ours as Found
    elif contender.maker == "transformers":
        from benchmarks.models.hugging_face import HuggingFace as Found  # type: ignore[assignment]
    elif contender.maker == "litgpt":
        from benchmarks.models.lit_gpt import LitGPT as Found  # type: ignore[assignment]
    else:
        from benchmarks.models.x_transformer import XTransformer as Found  # type: ignore[assignment]
    model = Found(shape, contender)
    model.module.to(device=device, dtype=DTYPES[dtype])
    return model


def random_like(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random values for a cache, one row repeated: generating gigabytes would take longer."""
    row = torch.randn(shape[-2:], device=like.device).to(like.dtype)
    return row.expand(shape)
