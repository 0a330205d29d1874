"""A family of foreign checkpoints: a table of settings and a table of names.

What it is compared by: compositions as built, on the meta device, without running them. Different texts (a default
written out, ``mha`` for ``gqa`` with as many heads, a number in a variant) may build the same model.

A model that holds a language model beside other parts is the family of that language model ``inside``: its
configuration under a key, its tensors under a prefix.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Part, Setting, Unused
from blockwright.plugins.hub.names import Row
from blockwright.registry import ConfigError

# Attributes and children without effect on what a trained model computes.
TRAINING = {"training", "bias_step", "bias_until", "loss_weight"}
OF_TRAINING = {"balance", "dropping"}


def traits(decoder: Decoder) -> dict[str, Any]:
    """Everything but the weights that determines a decoder's output: classes, numbers, shapes."""
    found: dict[str, Any] = {}
    for name, module in decoder.named_modules():
        if OF_TRAINING & set(name.split(".")):
            continue
        # The class whose methods run: a subclass that only defines a constructor computes what its parent
        # does. ``forward`` alone is not enough: gates differ in ``choose``, positions in ``rotate``.
        owner = next(cls for cls in type(module).__mro__ if any(_is_method(k, v) for k, v in vars(cls).items()))
        found[name] = f"{owner.__module__}.{owner.__qualname__}"
        for attribute, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str | tuple)
            if plain and not attribute.startswith("_") and attribute not in TRAINING:
                found[f"{name}.{attribute}"] = value
    return {**found, **{k: tuple(v.shape) for k, v in decoder.state_dict().items()}}


def _is_method(name: str, value: object) -> bool:
    return isinstance(value, FunctionType | property) and name not in ("__init__", "parallel_plan")


def difference(a: Decoder, b: Decoder) -> str | None:
    """The first difference between two decoders, as text; None if they compute the same."""
    ours, theirs = traits(a), traits(b)
    for key in {**ours, **theirs}:
        if ours.get(key) != theirs.get(key):
            return f"{key or 'decoder'}: {ours.get(key)} here, {theirs.get(key)} there"
    return None


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


Reader = Callable[[Config, dict[str, Any]], None]


def inside(key: str, read: Reader, model_type: str) -> Reader:
    """A reader of the configuration under a key, whose refusals name it."""

    def reader(config: Config, model: dict[str, Any]) -> None:
        inner = Config(config.take(key, kind=dict, default={}), config.mtp)
        inner.ignored = config.ignored & inner.values.keys()
        config.taken |= inner.ignored
        try:
            read(inner, model)
            inner.refuse_unread(model_type)
        except ConfigError as error:
            path = error.path.replace("config.json: ", f"config.json: {key}.", 1)
            raise ConfigError(path, error.value, error.rule, error.remedy) from None

    return reader


def language_of(family: Family, model_type: str, places: tuple[str, ...], left_out: tuple[str, ...]) -> Family:
    """A family that reads the language model out of a larger one, and writes nothing: ``family`` does.

    Args:
        family: of the language model, whose settings stand under ``text_config``
        model_type: of the larger model
        places: keys of the other parts
        left_out: names of the tensors of the other parts
    """

    def read(config: Config, model: dict[str, Any]) -> None:
        Fixed("model_type", family.model_type).read(config, model)
        model |= family.composition(config.values, config.mtp, config.ignored)
        config.taken |= config.values.keys()  # the family has refused what it does not read

    def write(decoder: Decoder, config: dict[str, Any]) -> None:
        raise LookupError(f"a language model alone is written as {family.model_type}")

    def read_tied(config: Config, model: dict[str, Any]) -> None:
        model["tie_embeddings"] = config.take("tie_word_embeddings", kind=bool, default=model["tie_embeddings"])

    return Family(
        model_type=model_type,
        architecture="",
        template={},
        settings=(
            Part(inside("text_config", read, model_type), write),
            Part(read_tied, write),  # that of the larger model decides
            *(Unused(key) for key in places),
        ),
        names=tuple(_moved(row) for row in family.names),
        left_out=left_out,
        sized=lambda decoder: tuple(_moved(row) for row in family.sized(decoder)),
    )


def _moved(row: Row) -> Row:
    """A row of the language model, for names as in the larger one."""
    return replace(row, theirs=_name(row.theirs), also=_name(row.also))


def _name(theirs: str) -> str:
    return theirs.replace("model.", "model.language_model.", 1) if theirs.startswith("model.") else theirs
