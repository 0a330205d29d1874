"""Models that hold a language model beside other parts: a configuration under a key, tensors under a prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Part, Unused
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.names import Row
from blockwright.registry import ConfigError

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
