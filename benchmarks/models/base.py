"""What a race asks of an implementation: a loss to train on, and a cache to decode with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from benchmarks.contender import Contender
from benchmarks.shapes import Shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model(ABC):
    """One implementation, built, with random weights.

    Attributes:
        module: the nn.Module that holds the parameters
        note: a choice that was made among its settings, in words; empty for none
    """

    module: Any
    note: str = ""

    @abstractmethod
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean next-token loss of [B,T] tokens and targets, as the library's own training computes it."""

    def choices(self, decoding: bool = False) -> list[str]:
        """Settings of the library's own among which the fastest is to be found by trying; none by default."""
        return []

    def choose(self, choice: str) -> None:
        """Set one of ``choices``."""
        raise NotImplementedError

    def compile(self) -> None:
        """Put the model under torch.compile."""
        self.module.compile()

    # ---- decoding ----

    def begin(self, batch: int, length: int) -> None:
        """Make an empty cache with room for ``length`` tokens a row."""
        raise NotImplementedError

    def prefill(self, tokens: Tensor) -> Tensor:
        """Read a prompt [B,T] into the cache; the logits after its last token, [B,V]."""
        raise NotImplementedError

    def fill(self, context: int) -> None:
        """Leave the cache as if ``context`` tokens had been read, with random contents: a step costs the same."""
        raise NotImplementedError

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token a row, [B,1]; the logits after it, [B,V]."""
        raise NotImplementedError

    def cache_bytes(self) -> int:
        """Bytes that the cache holds now."""
        raise NotImplementedError


def build(contender: Contender, shape: Shape, dtype: str, device: str, seed: int = 0) -> Model:
    """A contender's model; its library is imported here and nowhere before.

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
    """Random numbers for a cache, one row's worth repeated: filling gigabytes with a generator would take longer."""
    row = torch.randn(shape[-2:], device=like.device).to(like.dtype)
    return row.expand(shape)
