"""Where two models differ, and two runs: every setting of both, what they cost, and what runs have recorded.

Layers of one model that are alike are a group, and each group has its counterpart in the other model. A part of a layer
is grouped alone: in DeepSeek-V2 and V3 all layers have one attention, and two feed-forward blocks, of which the dense
one fills one layer there and three here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from blockwright.blocks.checkpoint.source import checkpoint_of, read_start
from blockwright.lab import describe
from blockwright.lab.card import Options, Request
from blockwright.lab.difference.settings import Composition, Entry, compared, flat
from blockwright.lab.drawing.figures import ranges
from blockwright.lab.models import FILES
from blockwright.registry import ConfigError
from blockwright.registry.folder import read_json, read_yaml
from blockwright.registry.limits import check_values
from blockwright.renamed import with_moved
from blockwright.training.checkpoints.record import KEY
from blockwright.training.data.tokenizers.tokenizer import vocabulary_of
from blockwright.training.result import Result

Settings = Mapping[str, Any]
RANGES = 3  # ranges of layers that are written out


@dataclass(frozen=True)
class Group:
    """The layers of a model whose part is the same.

    Args:
        layers: their indices
        settings: of the part
    """

    layers: tuple[int, ...]
    settings: Settings


@dataclass(frozen=True)
class Pair:
    """A group of A and its counterpart in B; one of them is None where the other model has nothing like it.

    Args:
        part: of the layers, such as ``ffn``
        a, b: the groups
    """

    part: str
    a: Group | None
    b: Group | None

    @property
    def entries(self) -> list[Entry]:
        return compared(self.a.settings if self.a else {}, self.b.settings if self.b else {})

    @property
    def same(self) -> bool:
        """Whether both have it with the same settings, in whichever layers."""
        return all(entry.same for entry in self.entries)

    def to_plain(self) -> dict[str, Any]:
        sides = {"a": self.a, "b": self.b}
        layers = {name: list(group.layers) for name, group in sides.items() if group}
        return {"part": self.part, "layers": layers, "settings": [entry.to_plain() for entry in self.entries]}


def grouped(layers: Sequence[Settings]) -> list[Group]:
    """The groups of a model's layers, in order of their first layers; those without the part are in none."""
    found: list[tuple[list[int], Settings]] = []
    for layer, settings in ((layer, own) for layer, own in enumerate(layers) if own):
        members = next((members for members, known in found if known == settings), None)
        if members is None:
            found.append(([layer], settings))
        else:
            members.append(layer)
    return [Group(tuple(members), settings) for members, settings in found]


def aligned(part: str, a: Sequence[Group], b: Sequence[Group]) -> list[Pair]:
    """Each group of one model with the group of the other that is most alike, the most alike first to choose.

    Of counterparts that are equally alike, the nearest in order is chosen. A group that is left has none.
    """
    by_likeness = sorted(
        product(range(len(a)), range(len(b))),
        key=lambda pair: (-likeness(a[pair[0]].settings, b[pair[1]].settings), abs(pair[0] - pair[1]), pair),
    )
    chosen: dict[int, int] = {}
    taken: set[int] = set()
    for ours, theirs in by_likeness:
        if ours not in chosen and theirs not in taken:
            chosen[ours] = theirs
            taken.add(theirs)
    pairs = [Pair(part, group, b[chosen[i]] if i in chosen else None) for i, group in enumerate(a)]
    return pairs + [Pair(part, None, group) for i, group in enumerate(b) if i not in taken]


def likeness(a: Settings, b: Settings) -> float:
    """From 0 to 1: the share of equal settings. A number against another counts half, so that a window is like one."""
    entries = compared(a, b)
    return sum(1.0 if entry.same else 0.5 * _are_numbers(entry.a, entry.b) for entry in entries) / len(entries)


def _are_numbers(*values: Any) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def spelt(group: Group | None, n_layers: int) -> str:
    """The layers of a group: ``all 60``, ``0``, ``1–59``; of a long pattern how many, and the first."""
    if group is None:
        return "–"
    if len(group.layers) == n_layers:
        return f"all {n_layers}"
    written = ranges(group.layers)
    if len(written) <= RANGES:
        return ", ".join(written)
    return f"{len(group.layers)} of {n_layers}: {written[0]}, …"


# --- the record of a run ----------------------------------------------------------------------------------------------


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


SCHEMA = "blockwright.diff/1"  # another number, if a key is removed or changes its meaning; keys may be added
SHOWN = ("val", "test")  # groups of figures that measure a model; of training, the loss


@dataclass(frozen=True)
class Side:
    """One of two models.

    Args:
        name: as shown
        model: its settings
        record: of the run that trained it; None if none did
    """

    name: str
    model: Composition
    record: Record | None = None


@dataclass(frozen=True)
class Runs:
    """What two runs have recorded.

    Args:
        settings: all but the model's
        whole: whether these are all settings; else those that can change a weight or a figure
        data, software: what their checkpoints say
        a, b: how they ended
    """

    settings: list[Entry]
    whole: bool
    data: list[Entry]
    software: list[Entry]
    a: Result | None
    b: Result | None

    @property
    def figures(self) -> list[Entry]:
        """The figures of both, those that measure the model."""
        return compared(*(_figures(result) for result in (self.a, self.b)))

    def unit(self, figure: str) -> str:
        """The unit of a figure; empty where it has none."""
        known = [r.figures[figure] for r in (self.a, self.b) if r is not None and figure in r.figures]
        return known[0].unit if known else ""


@dataclass(frozen=True)
class Difference:
    """A and B side by side.

    Args:
        a, b: the models
        model: settings that are not of single layers
        layers: groups of layers, each with its counterpart
        runs: None unless both are runs
    """

    a: Side
    b: Side
    model: list[Entry]
    layers: list[Pair]
    runs: Runs | None = None

    @cached_property
    def card(self) -> Mapping[str, Any]:
        """The document of ``blockwright describe`` on both, with the changes of B against A."""
        request = Request([self.a.name, self.b.name], [Options(), Options()], [], 0, True, None)
        return describe.document(request, [self.a.model.decoder, self.b.model.decoder])

    @property
    def changes(self) -> Mapping[str, float]:
        """Figure → relative difference, B to A."""
        changes: Mapping[str, float] = self.card["changes"][0]["change"]
        return changes

    @property
    def entries(self) -> list[Entry]:
        """Every setting of the compositions."""
        return [*self.model, *(entry for pair in self.layers for entry in pair.entries)]

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "schema": SCHEMA,
            "a": self.a.name,
            "b": self.b.name,
            "models": self.card["models"],
            "change": self.changes,
            "settings": [entry.to_plain() for entry in self.model],
            "layers": [pair.to_plain() for pair in self.layers],
            "runs": None if self.runs is None else _runs_to_plain(self.runs),
        }


def difference(a: Side, b: Side) -> Difference:
    """Compare two models; two that are runs, as runs too."""
    ours, theirs = a.model, b.model
    groups = {part: (grouped(ours.layers[part]), grouped(theirs.layers[part])) for part in ours.layers}
    pairs = [pair for part, (of_a, of_b) in groups.items() for pair in aligned(part, of_a, of_b)]
    recorded = _runs(a.record, b.record) if a.record and b.record else None
    return Difference(a, b, compared(ours.around, theirs.around), pairs, recorded)


def _runs(a: Record, b: Record) -> Runs:
    whole = a.written is not None and b.written is not None
    found = compared(a.written or {}, b.written or {}) if whole else compared(a.trained, b.trained)
    return Runs(found, whole, compared(a.data, b.data), compared(a.software, b.software), a.result, b.result)


def _figures(result: Result | None) -> dict[str, float]:
    if result is None:
        return {}
    names = [n for n in result.metrics if n == "train/loss" or n.partition("/")[0] in SHOWN]
    return {name: result.metrics[name] for name in names}


def _runs_to_plain(runs: Runs) -> dict[str, Any]:
    parts = {"settings": runs.settings, "data": runs.data, "software": runs.software}
    results = {name: r.to_plain() for name, r in (("a", runs.a), ("b", runs.b)) if r is not None}
    figures = [{**e.to_plain(), "difference": minus(e), "unit": runs.unit(e.path)} for e in runs.figures]
    plain = {name: [entry.to_plain() for entry in part] for name, part in parts.items()}
    return {**plain, "whole": runs.whole, "results": results, "figures": figures, "verdict": "none", "why": "one_seed"}


def minus(entry: Entry) -> float | None:
    """B − A of a figure; None where one of them has none."""
    both = all(isinstance(value, int | float) for value in (entry.a, entry.b))
    return entry.b - entry.a if both else None
