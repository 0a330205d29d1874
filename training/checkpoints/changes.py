"""Differences between the settings of a run and those of a checkpoint, and which of them matter."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockwright import registry
from blockwright.training.checkpoints.record import Past
from blockwright.training.configuration.instantiate import find_target

_LENGTH = "a longer run is still the same run"
SAME_RUN = {  # setting → why the run is still the same if it changes; such a change is shown
    "trainer.max_steps": _LENGTH,
    "trainer.max_epochs": _LENGTH,
    "trainer.max_time": _LENGTH,
    "trainer.min_steps": _LENGTH,
    "trainer.min_epochs": _LENGTH,
    "trainer.log_every_n_steps": "the same steps are logged, at other intervals",
}
# Keys of a model that affect training but not its output; all others determine the meaning of its weights.
TRAINING_ONLY = ("model.init", "model.max_positions", "model.mtp.loss_weight")
TRAINING_ONLY_PARTS = {"balance", "dropping", "bias_step", "bias_until"}
WIDEST = 48  # characters of a value in a table
_ABSENT = object()


@dataclass(frozen=True)
class Change:
    """A setting that differs.

    Args:
        path: of the setting
        there: its value in the checkpoint
        here: its value in this run
    """

    path: str
    there: Any
    here: Any

    @property
    def alters_weights(self) -> bool:
        """Whether the same weights compute something else with this change."""
        parts = self.path.split(".")
        training_only = self.path.startswith(TRAINING_ONLY) or TRAINING_ONLY_PARTS & set(parts)
        return parts[0] == "model" and not training_only

    def __str__(self) -> str:
        return f"{self.path} was {_shown(self.there)}, is {_shown(self.here)}"


def changes(past: Past, ours: Mapping[str, Any]) -> list[Change]:
    """Every setting that differs; for a checkpoint without a record, only among those that it holds.

    Args:
        past: of the checkpoint
        ours: the record of this run
    """
    parts = {**past.settings, **ours} if past.complete else past.settings
    found = [c for part in parts for c in _differences(part, past.settings.get(part), ours.get(part))]
    # A checkpoint without a record may come from an older version, which wrote out unset values.
    return [c for c in found if past.complete or None not in (c.there, c.here) or _ABSENT not in (c.there, c.here)]


def is_same_run(past: Past, ours: Mapping[str, Any]) -> bool:
    """Whether this run may be the one that wrote a checkpoint: only its length may differ, and how often it logs."""
    return not [change for change in changes(past, ours) if change.path not in SAME_RUN]


def weight_changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Change]:
    """The differences between two compositions that change what the same weights compute.

    Args:
        there: composition that the weights were trained in
        here: composition that they are put into
    """
    return [change for change in _differences("model", there, here) if change.alters_weights]


def _differences(path: str, there: Any, here: Any) -> Iterator[Change]:
    if there == here or (_is_empty(there) and _is_empty(here)):
        return
    if not isinstance(there, Mapping) or not isinstance(here, Mapping):
        yield Change(path, there, here)
        return
    for key in ("name", "_target_"):  # another block or class has other parameters
        if there.get(key) != here.get(key):
            yield Change(path, there.get(key), here.get(key))
            return
    for key in {**there, **here}:
        old, new = there.get(key, _ABSENT), here.get(key, _ABSENT)
        if (old is _ABSENT) != (new is _ABSENT) and _default(path, here, key) == (new if old is _ABSENT else old):
            continue  # one command line writes out defaults, the other may not
        yield from _differences(f"{path}.{key}", old, new)


def _default(path: str, node: Mapping[str, Any], key: str) -> Any:
    """The default value of an argument of the class of a node: by ``_target_``, or as the task, the data or a start.

    Args:
        path: of the node
        node: from this run's configuration, never a checkpoint's: its class is imported
        key: the argument
    """
    found: Any = None
    if "_target_" in node:
        found = inspect.signature(find_target(node["_target_"], "")).parameters.get(key)
    elif path in registry.names("start"):
        found = registry.lookup("start", path).schema.parameters.get(key)
    elif path in registry.kinds(registry.ROOT) and node.get("name") in registry.names(path):
        found = registry.lookup(path, node["name"]).schema.parameters.get(key)
    default = _ABSENT if found is None else found.default
    return list(default) if isinstance(default, tuple) else default


def _is_empty(value: Any) -> bool:
    """``layout: null`` equals ``layout: {}``; an absent child does not equal null."""
    return value is None or value in ({}, [])


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not set"
    if isinstance(value, Mapping) and set(value) == {"name"}:
        value = value["name"]
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def table(found: Sequence[Change]) -> str:
    """A table with a row per change: setting, value in the checkpoint, value here."""
    rows = [("setting", "in the checkpoint", "here")]
    rows += [(change.path, _shown(change.there), _shown(change.here)) for change in found]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return "\n".join(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def listed(found: Sequence[Change], most: int = 3) -> str:
    """The first changes as text."""
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(map(str, found[:most])) + more
