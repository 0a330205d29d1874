"""A start of a package's own: ``vectors=file vectors.file=FILE``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockwright import ConfigError, Start, register


@register("start", "vectors")
class Vectors(Start):
    """An embedding from a file, which is not trained.

    Args:
        file: a tensor [V,D], written by torch.save
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def check(self, model: Mapping[str, Any]) -> list[str]:
        if not self.file.exists():
            raise ConfigError("vectors.file", str(self.file), "there is no such file", "Name one: vectors.file=FILE")
        return [f"the embedding is that of {self.file}"]

    def attach(self, decoder):
        decoder.embedding.requires_grad_(False)

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        for name, parameter in part.named_parameters():
            if prefix + name == "embedding.weight":
                with torch.no_grad():
                    parameter.copy_(torch.load(self.file, weights_only=True))
