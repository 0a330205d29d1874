"""The bank of noise: what earlier ablations measured of the standard deviation of a paired difference.

It is a line of JSON for each ablation that has ended, in ``noise.jsonl`` of the log folder; a few recorded ones are
shipped. A plan looks up the noise of its own data, shape, length and rate. It never takes that of another rate: the
higher the rate, the less two runs of a seed have in common. Verdicts take it only from runs of other seeds than their
own: an ablation that is started again, or with more seeds, would else count the same runs twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from blockwright.lab.report.sweep import Bank
from blockwright.registry import ConfigError
from blockwright.registry.folder import MAX_JSON_BYTES, append_lines, parse_json, read_text
from blockwright.registry.ranges import Count, NonNegative, Positive, Seed
from blockwright.registry.reading import read as read_settings

FILE = "noise.jsonl"
SHIPPED = Path(__file__).parent
ROUNDING = 1e-9
SAME = ("metric", "data", "d_model", "n_layers", "optimizer", "scheduler", "precision")  # of two near shapes
Maybe = Positive | None


@dataclass(frozen=True)
class Shape:
    """What noise depends on.

    Args:
        metric: compared figure
        params: of the baseline
        d_model, n_layers: of the baseline
        tokens: of a job; None if epochs are counted
        tokens_per_step: over all processes; None if the data does not say
        optimizer: name of its class
        lr: peak rate of the baseline; None if the optimizer has none
        scheduler: name of its class, with its settings
        precision: of the trainer
        data: digest of corpus, windows, length, task and callbacks; empty of older entries, which are near no shape
    """

    metric: str
    params: Maybe = None
    d_model: Count | None = None
    n_layers: Count | None = None
    tokens: Maybe = None
    tokens_per_step: Maybe = None
    optimizer: str = ""
    lr: Maybe = None
    scheduler: str = ""
    precision: str = ""
    data: str = ""

    @property
    def steps(self) -> float | None:
        return self.tokens / self.tokens_per_step if self.tokens and self.tokens_per_step else None

    def distance(self, other: Shape, rates: float = 1) -> float:
        """Octaves between two shapes, over parameters, steps and rate; infinite if noise cannot be carried over.

        Args:
            other: the shape whose noise is known
            rates: octaves that their rates may be apart
        """
        if not self.data or any(getattr(self, name) != getattr(other, name) for name in SAME):
            return math.inf
        size, length, rate = (
            _apart(self.params, other.params),
            _apart(self.steps, other.steps),
            _apart(self.lr, other.lr),
        )
        is_near = max(size, length) <= 1 + ROUNDING and rate <= rates + ROUNDING
        return math.hypot(size, length, rate) if is_near else math.inf


def _apart(one: float | None, other: float | None) -> float:
    """Octaves; infinite if one is not known."""
    return abs(math.log2(one / other)) if one and other else math.inf


@dataclass(frozen=True)
class Entry(Shape):
    """The noise of one ablation.

    Args:
        sd: σ of a paired difference, in the unit of the metric
        dof: degrees of freedom of its estimate
        tuned: whether ``lr`` is the vertex of tries
        seeds: of the runs
        seconds: wall time of a job on this machine; None of a shipped entry
        workers: jobs at a time while that was measured
        versions: package → version
        date: of the end, YYYY-MM-DD
        name: of the ablation
        source: its folder
    """

    sd: Positive = 1.0
    dof: Positive = 1.0
    tuned: bool = False
    seeds: tuple[Seed, ...] = ()
    seconds: NonNegative | None = None
    workers: Count = 1
    versions: dict[str, str] = field(default_factory=dict)
    date: str = ""
    name: str = ""
    source: str = ""

    @property
    def origin(self) -> str:
        """For messages."""
        return " of ".join(filter(None, (self.name, self.date)))

    @property
    def bank(self) -> Bank:
        """For verdicts."""
        return Bank(self.sd, self.dof, self.origin, self.seeds)

    def as_line(self) -> str:
        """A line of the bank."""
        return json.dumps({key: value for key, value in asdict(self).items() if value not in (None, {}, "", ())}) + "\n"


def read(folder: Path) -> list[Entry]:
    """The entries of a folder's bank; none without a file.

    Raises:
        ConfigError: a line that is no entry
    """
    if not (folder / FILE).is_file():
        return []
    lines = enumerate(read_text(folder, FILE, MAX_JSON_BYTES).splitlines(), 1)
    return [_entry(line, f"{folder / FILE}:{number}") for number, line in lines if line.strip()]


def _entry(line: str, path: str) -> Entry:
    try:
        return read_settings(Entry, parse_json(line, path))
    except ConfigError as error:
        rule = f"is no entry of a bank of noise ({error.path.removeprefix(path)} {error.rule})"
        raise ConfigError(path, "…", rule, "Remove this line") from None


def known(log_dir: Path) -> list[Entry]:
    """All entries: those of a log folder before the shipped ones."""
    return [*read(log_dir), *read(SHIPPED)]


def nearest(shape: Shape, entries: Sequence[Entry], tuned: float = 0) -> Entry | None:
    """The entry of the nearest shape, within a factor of 2 in parameters, steps and rate; None if none is.

    Args:
        shape: of the baseline, with its composed rate
        entries: of the bank; of a tie the first counts
        tuned: octaves around that rate in which it will be tuned. A rate in there to which one of this shape was tuned
            is what it will be tuned to, and precedes rates that were not
    """
    apart = {i: shape.distance(each, max(1, tuned) if each.tuned else 1) for i, each in enumerate(entries)}
    near = [i for i, distance in apart.items() if distance < math.inf]
    order = sorted(near, key=lambda i: (entries[i].tuned != bool(tuned), apart[i]))
    return entries[order[0]] if order else None


def seconds_a_job(shape: Shape, entries: Sequence[Entry], workers: int) -> float | None:
    """Wall time of a job on this machine, by the nearest earlier one of as many workers; None if there is none."""
    timed = [each for each in entries if each.seconds and each.workers == workers and each.tokens and shape.tokens]
    alike = {name: getattr(shape, name) for name in (*SAME, "lr") if name != "precision"}
    near = [(shape.distance(replace(each, **alike)), each) for each in timed]
    distance, best = min(near, key=lambda pair: pair[0], default=(math.inf, None))
    if best is None or distance == math.inf:
        return None
    return best.seconds * shape.tokens / best.tokens  # type: ignore[operator]


def append(log_dir: Path, entry: Entry) -> None:
    """Add an entry at the end, unless its source has one.

    Raises:
        ConfigError: a line of the file is no entry, or it cannot be written
    """
    if any(each.source == entry.source for each in read(log_dir)):
        return
    try:
        append_lines(log_dir / FILE, entry.as_line())
    except OSError as error:
        rule = f"cannot be written ({error.strerror or error}), so later ablations do not know this noise"
        raise ConfigError(str(log_dir / FILE), "…", rule, "Make room, or the folder writable, and resume") from None


def shape_of(plan: Mapping[str, Any]) -> Shape:
    """The shape that a plan records."""
    return read_settings(Shape, plan.get("shape"), "shape")
