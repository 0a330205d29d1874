"""The record of a run: its settings, its data, its software and its figures, read from a folder that may be untrusted.

Nothing of it is built or resolved: ``${…}`` is shown as it is written. The hardware is not recorded, except for
what the settings of the trainer say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.source import checkpoint_of, read_start
from blockwright.lab.difference.settings import flat
from blockwright.lab.models import FILES
from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json, read_yaml
from blockwright.registry.limits import check_values
from blockwright.renamed import with_moved
from blockwright.training.checkpoints.record import KEY
from blockwright.training.data.tokenizers.base import vocabulary_of
from blockwright.training.result import Result

SETTINGS = ".hydra/config.yaml"
CURVES = "curves.json"
MODEL = "model"  # compared as a composition


@dataclass(frozen=True)
class Record:
    """What a run has recorded, each part a mapping of paths to plain values.

    Args:
        written: all settings of its last start; None where the folder has no ``.hydra``
        trained: settings that can change a weight or a figure, in its last checkpoint
        data: what determines its batches: digest of the corpus, tokenizer, sizes, seed, and how many it has read
        software: versions
        result: how it ended; of a checkpoint alone, None
    """

    written: dict[str, Any] | None
    trained: dict[str, Any]
    data: dict[str, Any]
    software: dict[str, Any]
    result: Result | None


def read(name: str) -> Record | None:
    """The record of a run's folder or of a checkpoint; None for a model that no run of this project has trained.

    Args:
        name: of the model on the command line, one that ``lab.models.load`` has read

    Raises:
        ConfigError: a file is unreadable, or holds too much
    """
    start = Path(name)
    if start.suffix in FILES or not start.exists() or checkpoint_of(start) is None:
        return None
    checkpoint, is_run = read_start(start), start.is_dir() and checkpoint_of(start) != start
    written = read_yaml(start, SETTINGS) if is_run and (start / SETTINGS).is_file() else None
    result = Result.read(start) if is_run else None
    return Record(
        _settings(written, str(start / SETTINGS)) if isinstance(written, Mapping) else None,
        _settings(checkpoint.get(KEY), name),
        {**_data(checkpoint, name), **(_tokens(start, result.steps) if result else {})},
        _software(checkpoint),
        result,
    )


def _settings(found: Any, where: str) -> dict[str, Any]:
    """All settings but those of the model."""
    if not isinstance(found, Mapping):
        return {}
    check_values(found, where, data=False)
    return _plain({key: value for key, value in with_moved(found).items() if key != MODEL})


def _plain(nested: Mapping[str, Any]) -> dict[str, Any]:
    """A flat mapping of plain values; of any other the name of its type, which a pickle may hold."""
    kept = str | int | float | list | None
    return {path: value if isinstance(value, kept) else type(value).__name__ for path, value in flat(nested).items()}


def _tokens(run: Path, steps: float | None) -> dict[str, Any]:
    """Tokens trained on, by the record of the curves; nothing where it is missing or damaged."""
    try:
        curves = read_json(run, CURVES)
    except ConfigError:
        return {}
    each = curves.get("tokens_per_step") if isinstance(curves, dict) else None
    try:
        return {"tokens": int(each * steps)} if isinstance(each, int) and steps else {}
    except (OverflowError, ValueError):  # numbers that no run has
        return {}


def _data(checkpoint: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The state of the data module, which has a tokenizer; of that kind, size and a digest."""
    state = next((v for v in checkpoint.values() if isinstance(v, Mapping) and "tokenizer" in v), {})
    words = state.get("tokenizer")
    others = {key: value for key, value in state.items() if key != "tokenizer"}
    check_values(others, where, data=False)
    known = {"tokenizer": _tokenizer(words)} if isinstance(words, Mapping) else {}
    return _plain({**known, **others})


def _tokenizer(state: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in vocabulary_of(state).items() if isinstance(value, str | int)}
    digest = hashlib.sha256(repr(sorted(plain.items())).encode(errors="replace")).hexdigest()
    return {"kind": str(plain.get("kind"))[:60], "vocab_size": plain.get("vocab_size"), "contents": digest}


def _software(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    version, plugins = checkpoint.get("pytorch-lightning_version"), checkpoint.get("distributions")
    found = {"lightning": version} if isinstance(version, str) else {}
    if not isinstance(plugins, Mapping):
        return found
    return {**found, **{str(name): each.get("version") for name, each in plugins.items() if isinstance(each, Mapping)}}
