"""The command line of ``blockwright throughput``, parsed and validated."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from blockwright.blocks.checkpoint.source import DTYPES
from blockwright.lab.match.request import swept
from blockwright.registry import BlockError, ConfigError, did_you_mean
from blockwright.registry.command import Parser, read_words
from blockwright.registry.ranges import Count
from blockwright.registry.reading import Remedy, keys, read, typed

Bits = Literal[8, 6, 4] | None
UNITS = {
    "B": 1,
    **{f"{prefix}{i}B": (1024 if i else 1000) ** n for n, prefix in enumerate("KMGT", 1) for i in ("", "I")},
}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B)", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """The settings of a command line; see ``USAGE`` of the command."""

    memory: Annotated[str, Remedy("Write e.g. memory=64MB")]
    bits: Annotated[tuple[Bits, ...], Remedy("Write null, 8, 6 or 4, or several: bits=null,6")] = (None,)
    context: Annotated[tuple[Count, ...], Remedy("Write a number of tokens, or several: context=256,1024")] = (1024,)
    baseline: str | None = None
    rows: Count | None = None
    repeats: Annotated[int, Ge(1), Le(1000)] = 5
    steps: Annotated[int, Ge(1), Le(10_000)] = 4
    dtype: str = "float32"
    device: str | None = None
    threads: Annotated[int, Ge(1), Le(1024)] = 1

    def __post_init__(self) -> None:
        if not self.budget:
            raise BlockError("memory", self.memory, "is a number of bytes with its unit", "Write e.g. memory=64MB")
        if self.dtype not in DTYPES:
            raise BlockError("dtype", self.dtype, "is not supported", did_you_mean(self.dtype, DTYPES))
        for key in ("bits", "context"):
            values = getattr(self, key)
            if not values:
                example = {"bits": "null,6", "context": "1024"}[key]
                raise BlockError(key, [], "names no value", f"Write e.g. {key}={example}, or leave it out")
            if len(set(values)) < len(values):
                raise BlockError(key, list(values), "names each value once", f"Write {key}={_shown(values)}")
        least = self.steps + 2  # a token of the prompt, and the step before those that are timed
        if min(self.context) < least:
            rule = f"must hold the {self.steps} steps of a turn, the one before them and a prompt: {least} tokens"
            raise BlockError("context", min(self.context), rule, "Lengthen it, or lower steps")

    @property
    def budget(self) -> int:
        """Bytes; 0 for a text that is no size."""
        match = _SIZE.fullmatch(self.memory.strip())
        return int(float(match[1]) * UNITS[match[2].upper()]) if match else 0


def _shown(values: Sequence[int | None]) -> str:
    return ",".join("null" if value is None else str(value) for value in dict.fromkeys(values)) or "…"


@dataclass(frozen=True)
class Request:
    """A parsed and validated command line.

    Args:
        arms: name → overrides, in the order of the sweep
        baseline: the arm that the others are compared with
        settings: of the measurement
        log_dir: overrides of ``paths.log_dir``
        command: as it was written
        as_json: whether to print one document of plain numbers
    """

    arms: dict[str, list[str]]
    baseline: str
    settings: Settings
    log_dir: list[str]
    command: str
    as_json: bool


def read_request(arguments: Sequence[str]) -> Request:
    """Parse a command line.

    Raises:
        ConfigError: no arms, an unknown option, an invalid value, an arm named twice
    """
    parser = Parser(prog="blockwright throughput")
    parser.add_argument("--json", action="store_true")
    flags, words = read_words(parser, arguments, keys(Settings))
    log_dir = [word for word in words.overrides if word.startswith("paths.log_dir=")]
    overrides = [word for word in words.overrides if word not in log_dir]
    for key, _, value in (word.partition("=") for word in overrides):
        if not key.lstrip("+~").startswith("model"):
            rule = "is no option and changes no model"
            raise ConfigError(key, value, rule, did_you_mean(key, [*keys(Settings), "model", "paths.log_dir"]))
    settings = read(Settings, typed(Settings, words.settings))
    if not overrides:
        raise ConfigError("model", None, "must name arms", "Write e.g. model=tiny model/attention=mha,gqa,mla")
    arms = swept(overrides)
    baseline = settings.baseline or next(iter(arms))
    if baseline not in arms:
        raise ConfigError("baseline", baseline, "is the name of an arm", did_you_mean(baseline, arms))
    command = shlex.join(["blockwright", "throughput", *arguments])
    return Request(arms, baseline, settings, log_dir, command, flags.json)
