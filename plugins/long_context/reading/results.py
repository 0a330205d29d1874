"""Check what is asked of reading tests, and write what they found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from blockwright.lab.report.svg import standalone
from blockwright.plugins.long_context.reading.base import ReadingTest, Text, Wording
from blockwright.plugins.long_context.reading.measure import Grid, PositionLoss, prompts
from blockwright.plugins.long_context.reading.report import FILE, Reading, heat_map
from blockwright.registry import ConfigError
from blockwright.registry.folder import write_json, write_text


def check_lengths(lengths: Sequence[int], room: int, path: str) -> list[int]:
    """Lengths in ascending order.

    Raises:
        ConfigError: at ``path``: none, or one beyond the model's positions
    """
    if not lengths:
        raise ConfigError(path, list(lengths), "must list at least one length", "Write e.g. [512,4096]")
    longest = max(lengths)
    if longest > room:
        rule = f"makes prompts of {longest} tokens, but the model has positions for {room}"
        raise ConfigError(path, longest, rule, f"Write at most {room}, or raise model.max_positions")
    return sorted(set(lengths))


def check_depths(depths: Sequence[float], path: str) -> list[float]:
    """Depths in ascending order.

    Raises:
        ConfigError: at ``path``: none, or one outside 0 to 1
    """
    found = sorted(set(map(float, depths)))
    if not found or found[0] < 0 or found[-1] > 1:
        raise ConfigError(path, list(depths), "must list depths from 0 to 1", "Write e.g. [0.05,0.5,0.95]")
    return found


def try_prompts(tests: Sequence[ReadingTest], grid: Grid, text: Text, words: Wording, path: str) -> None:
    """Refuse prompts that cannot be made, by making one of each.

    Raises:
        ConfigError: at ``path``: there is no text to hide facts in, or a length is too short for them
    """
    if not len(text):
        rule = "hides facts in validation text, and the corpus has none"
        raise ConfigError(path, list(grid.lengths), rule, "Hold some out: data.corpus.val_fraction=0.05")
    for test in tests:
        for length in grid.lengths:
            try:
                next(prompts(test, length, 0.5, text, words, replace(grid, samples=1)))
            except ConfigError as error:
                raise ConfigError(path, length, f"{error.rule} ({test.name})", error.remedy) from None


def write(directory: Path, readings: Sequence[Reading], loss: PositionLoss | None) -> list[Path]:
    """Write ``reading.json`` and a heat map of each test; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"tests": [r.as_plain() for r in readings], "loss": None if loss is None else loss.as_plain()}
    write_json(directory / FILE, document)
    files = [directory / FILE]
    for reading in readings:
        files.append(directory / f"reading-{reading.test}.svg")
        write_text(files[-1], standalone(heat_map(reading, f"reading-{reading.test}")))
    return files
