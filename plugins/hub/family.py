"""A family of foreign checkpoints: a table of settings and a table of names."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Setting
from blockwright.plugins.hub.fingerprint import difference
from blockwright.plugins.hub.names import Row
from blockwright.registry import ConfigError


class UnlikeError(LookupError):
    """Every part of the decoder exists in this family, but the family's config.json describes another model."""


@dataclass(frozen=True)
class Family:
    """One ``model_type``, as data.

    Args:
        model_type: its value in config.json
        architecture: name of the class in transformers
        template: the composition before any setting is read
        settings: rows between config.json and the composition
        names: rows between their tensors and ours
        left_out: regular expressions of their tensors without model content (tables, masks) or left out on purpose;
            ``{behind}`` in them is the number of any layer after the last one
        sized: further rows, whose layout depends on the sizes of a decoder
        prefix: start of every name but the output head's; checkpoints without it are read too
    """

    model_type: str
    architecture: str
    template: Mapping[str, Any]
    settings: tuple[Setting, ...]
    names: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    sized: Callable[[Decoder], tuple[Row, ...]] = lambda decoder: ()
    prefix: str = "model."

    def composition(
        self, values: Mapping[str, Any], mtp: bool = False, ignored: Collection[str] = ()
    ) -> dict[str, Any]:
        """The composition that a config.json describes.

        Args:
            values: its contents
            mtp: whether to keep multi-token prediction heads
            ignored: keys that the user declares to have no effect

        Raises:
            ConfigError: a key is missing, wrong, or has a value that is not supported
        """
        config, model = Config(values, mtp, ignored), copy.deepcopy(dict(self.template))
        std = config.take("initializer_range", kind=float, default=0.02)
        model["init"] = {"std": std}
        for setting in self.settings:
            setting.read(config, model)
        config.refuse_unread(self.model_type)
        return model

    def config(self, decoder: Decoder) -> dict[str, Any]:
        """The config.json of a decoder of this family.

        Raises:
            LookupError: the decoder is not of this family, and why
        """
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        try:
            for setting in self.settings:
                setting.write(decoder, values)
            values["initializer_range"] = decoder.config["init"]["std"]
            again = compose(self.composition(values, mtp=True), device="meta")
        except (
            ArithmeticError,
            AttributeError,
            ConfigError,
            LookupError,
            StopIteration,
            TypeError,
            ValueError,
        ) as error:
            raise LookupError(self._why(error)) from None
        if unlike := difference(decoder, again):
            raise UnlikeError(unlike)
        return values

    def _why(self, error: Exception) -> str:
        """What of a decoder this family lacks, in words."""
        if isinstance(error, AttributeError) and error.name is not None:
            kind, setting = type(error.obj).__name__, error.name
            return f"{self.model_type} needs {setting} of a layer, and {kind} has none"
        if isinstance(error, ConfigError):
            return f"{error.path} {error.rule}"
        return str(error) or f"{self.model_type} has no word for a setting of it"

    def rows(self, decoder: Decoder) -> tuple[Row, ...]:
        """The table of names for a decoder of this family."""
        return (*self.names, *self.sized(decoder))

    def leaves_out(self, name: str, n_layers: int) -> bool:
        """Whether a tensor of theirs that no row reads is allowed."""
        behind = "|".join(str(n_layers + k) for k in range(8))
        return any(re.fullmatch(pattern.replace("{behind}", f"({behind})"), name) for pattern in self.left_out)
