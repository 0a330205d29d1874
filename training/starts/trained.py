"""``init_from=RUN``: copy the weights of a run, a checkpoint or an imported folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from blockwright.blocks.checkpoint.source import check_init, load_part, load_weights, read_origin, read_start
from blockwright.blocks.decoder import Decoder
from blockwright.registry import ConfigError, register
from blockwright.training.checkpoints.record import past_of
from blockwright.training.starts.base import Start, Text
from blockwright.training.starts.options import options
from blockwright.training.starts.swaps import changed_window, check_swaps


@register("start", "init_from")
class Trained(Start):
    """The weights of a trained model whose composition has the same names and shapes."""

    def __init__(self, init_from: str) -> None:
        self.trained, self.folder = init_from, Path(init_from)

    def compare(self, there: Mapping[str, Any], here: Mapping[str, Any], allowed: bool) -> list[str]:
        lines = check_swaps(there, here, str(self.trained), allowed)
        return [f"starts from {self.trained}; " + "; ".join(lines)] if lines else []

    def check(self, model: Mapping[str, Any]) -> list[str]:
        try:
            check_init(self.folder, model)
        except ConfigError as error:
            raise ConfigError(error.path, error.value, error.rule, f"{error.remedy}{_or_derive()}") from None
        if not (checkpoint := read_start(self.folder)):
            return []
        trained = (past_of(checkpoint).settings.get("data") or {}).get("sequence_length")
        line = changed_window(model, trained)
        return [f"starts from {self.trained}; {line}"] if line else []

    def fill(self, decoder: Decoder, text: Text) -> None:
        load_weights(decoder, self.folder)

    def fill_part(self, part: nn.Module, prefix: str) -> None:
        load_part(part, self.folder, prefix)

    def origin(self) -> dict[str, Any]:
        return read_origin(self.folder)


def _or_derive() -> str:
    """What else to write where weights do not fit: the starts that derive them."""
    return "".join(f", or {option} to derive these weights" for option in options(lambda start: start.derives))
