"""Settings of an ablation that contradict or replace each other: those of the seeds, and those of the rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from blockwright.registry import ConfigError

SEQUENTIAL = ("until", "looks", "spend", "hours")
OF_TUNING = ("tune", "tune_seeds", "tuned_by")
REPLACES = {  # key of the command line → keys of the file that it takes the place of
    "lr": OF_TUNING,
    "tune": ("lr",),
    "seeds": ("see", "pairs", *SEQUENTIAL),
    "see": ("seeds", *SEQUENTIAL),
    **dict.fromkeys(SEQUENTIAL, ("seeds", "see", "pairs")),
}
CONTRADICT = (("lr", "tune"), ("seeds", "see"), ("seeds", "until"), ("seeds", "hours"), ("see", "looks"))


def replaced(written: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file, changed by those of the command line."""
    gone = {key for change in changes for key in REPLACES.get(change, ())}
    gone |= set(OF_TUNING[1:]) if changes.get("tune", ...) is None else set()
    gone -= changes.keys()
    return {**{key: value for key, value in written.items() if key not in gone}, **changes}


def refuse_contradictions(settings: Mapping[str, Any]) -> None:
    """Refuse two settings that choose the same, and one that has no effect without another.

    Raises:
        ConfigError: at the second of the two
    """
    chosen = {key: value for key, value in settings.items() if value is not None}
    for path, rule, remedy in _faults(chosen):
        raise ConfigError(path, chosen[path], rule, remedy)


def _faults(chosen: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Path, rule and remedy of each."""
    pairs = [*CONTRADICT, *([] if "until" in chosen else [("see", "hours")])]
    for one, other in pairs:
        if one in chosen and other in chosen:
            what = "which rate" if one == "lr" else "how many seeds"
            yield other, f"says {what}, and so does {one}", f"Leave out {one} or {other}"
    uses = {"looks": "until", "spend": "until", "pairs": "see", **dict.fromkeys(OF_TUNING[1:], "tune")}
    for key, needed in uses.items():
        if key in chosen and needed not in chosen:
            example = {"until": "until: verdict", "see": "see: 0.01", "tune": "tune: 5"}[needed]
            yield key, f"has no use without {needed}", f"Write {example} too, or leave out {key}"
    if isinstance(rates := chosen.get("lr"), list | tuple) and len(rates) > 1:
        for key in ("see", "until", "hours"):
            if key in chosen:
                rule = "chooses the seeds of one rate an arm, but lr lists several"
                yield key, rule, f"Leave out lr, so that each arm is tuned, or {key}"
