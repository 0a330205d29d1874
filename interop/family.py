"""What a family of foreign checkpoints is: a table of settings and a table of names."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from blocks.compose import compose
from blocks.decoder import Decoder
from interop.config import Config, Setting
from interop.fingerprint import difference
from interop.names import Row
from registry import ConfigError


class UnlikeError(LookupError):
    """A family has a place for everything that a decoder is made of, and yet describes another."""


@dataclass(frozen=True)
class Family:
    """One ``model_type``, as data.

    Args:
        model_type: the word for it in config.json
        architecture: their class
        template: the composition before any setting is read
        settings: rows between config.json and the composition
        names: rows between their tensors and ours
        left_out: regular expressions of tensors of theirs that hold nothing of the model (tables, masks) or that are
            left out on purpose; ``{behind}`` in them is the number of any layer behind the last one
        prefix: what every name but the head's begins with; checkpoints without it are read too
    """

    model_type: str
    architecture: str
    template: Mapping[str, Any]
    settings: tuple[Setting, ...]
    names: tuple[Row, ...]
    left_out: tuple[str, ...] = ()
    prefix: str = "model."

    def composition(
        self, values: Mapping[str, Any], mtp: bool = False, ignored: Collection[str] = ()
    ) -> dict[str, Any]:
        """The composition that a config.json describes.

        Args:
            values: its contents
            mtp: whether to keep heads of multi-token prediction
            ignored: keys that the user says change nothing

        Raises:
            ConfigError: a key is missing or wrong, or says something that nothing here computes
        """
        config, model = Config(values, mtp, ignored), copy.deepcopy(dict(self.template))
        std = config.take("initializer_range", kind=float, default=0.02)
        model["init"] = {"std": std}
        for setting in self.settings:
            setting.read(config, model)
        config.refuse_unread(self.model_type)
        return model

    def config(self, decoder: Decoder) -> dict[str, Any]:
        """The config.json of a decoder that is of this family.

        Raises:
            LookupError: it is not, and in which respect
        """
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        try:
            for setting in self.settings:
                setting.write(decoder, values)
            values["initializer_range"] = decoder.config["init"]["std"]
            again = compose(self.composition(values, mtp=True), device="meta")
        except (AttributeError, ConfigError, KeyError, StopIteration, TypeError, ZeroDivisionError) as error:
            raise LookupError(str(error)) from None
        if unlike := difference(decoder, again):
            raise UnlikeError(unlike)
        return values

    def leaves_out(self, name: str, n_layers: int) -> bool:
        """Whether a tensor of theirs that no row reads may be there."""
        behind = "|".join(str(n_layers + k) for k in range(8))
        return any(re.fullmatch(pattern.replace("{behind}", f"({behind})"), name) for pattern in self.left_out)
