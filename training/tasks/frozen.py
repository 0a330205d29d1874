"""Parts of a model that are not trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from blockwright.training.patterns import matching


def freeze(decoder: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters that match any pattern from training.

    Raises:
        ConfigError: a pattern matches no parameter
    """
    parameters = dict(decoder.named_parameters())
    for name in matching(parameters, patterns, "task.frozen"):
        parameters[name].requires_grad_(False)
