"""The page of a study: tables of means, intervals and seeds, and the comparison of gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from blockwright_asap import pictures, story
from blockwright_asap.measures import HORIZONS
from blockwright_asap.methods import MEANING
from blockwright_asap.replacing import replaced
from blockwright_asap.robot import JOINTS

NAMES = {
    "vanilla in the simulator": "not tuned, in the simulator",
    "vanilla": "not tuned",
    "floor": "the real physics, motor state unknown (floor)",
    **MEANING,
}
RELATIVE = (("E_mpjpe", "mpjpe"), ("E_acc", "acc"), ("E_vel", "vel"))
ERROR = ("all", "g_mpjpe")
Results = Sequence[Mapping[str, Any]]


def write(folder: Path, seeds: Sequence[int], tune: int) -> Path:
    """``report.md`` and its plots, from the results of the seeds' folders."""
    results = read(folder, seeds, tune)
    replayed = [(f"{s} s", (s, "g_mpjpe")) for s in HORIZONS]
    replayed += [(name, ("1.0", key)) for name, key in RELATIVE]
    deployed = [("success, %", ("all", "success")), ("E_g-mpjpe", ERROR)]
    deployed += [(name, ("all", key)) for name, key in RELATIVE]
    parts = [
        "# Real to simulation and back",
        f"Seeds {', '.join(map(str, seeds))}; means ± half of the 95 % interval over seeds (t), sd in brackets. "
        "E in mm, mm/frame², mm/frame.",
        "## Open loop: held-out real rollouts replayed in the corrected simulator, E_g-mpjpe; at 1 s the others",
        _table(results, "open", replayed, ("1.0", "g_mpjpe")),
        f"## Closed loop: tuned for {tune} iterations where the row says, deployed in the real",
        _table(results, "closed", deployed, ERROR),
        "## Way from the control to tuning in the real that a method closes, paired by seed",
        _closed(results),
        "## Size of the correction by joint, mean |Δa|",
        _table(results, "size", [(joint, ("joints", i)) for i, joint in enumerate(JOINTS)]),
    ]
    found = pictures.plot(folder, results, NAMES)
    parts += [f"![{file.stem}]({file.name})" for file in found]
    file = folder / "report.md"
    with replaced(file) as partial:
        partial.write_text("\n\n".join(parts) + "\n")
    return file


def compare(out: Path, gaps: Sequence[str], seeds: Sequence[int], tune: int) -> Path:
    """``gaps.md``: where identification suffices, and where only a correction helps."""
    by_gap = {gap: read(out / gap, seeds, tune) for gap in gaps}
    parts = ["# The gaps apart", f"E_g-mpjpe, mm; seeds {', '.join(map(str, seeds))}; ± half of the 95 % interval."]
    for part, what, path in (
        ("open", "Open loop at 1 s", ("1.0", "g_mpjpe")),
        ("closed", "Closed loop in the real", ERROR),
    ):
        present = {name for results in by_gap.values() for result in results for name in result[part]}
        rows = [f"| {what} | {' | '.join(gaps)} |", f"|---{'|---' * len(gaps)}|"]
        for name in (n for n in NAMES if n in present):
            cells = [cell(values(results, part, name, path)) for results in by_gap.values()]
            rows.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
        parts.append("\n".join(rows))
    file = out / "gaps.md"
    with replaced(file) as partial:
        partial.write_text("\n\n".join(parts) + "\n")
    return file


def read(folder: Path, seeds: Sequence[int], tune: int) -> Results:
    return [story.read(folder / str(seed), tune) for seed in seeds]


def values(results: Results, part: str, name: str, path: Sequence[Any]) -> list[float]:
    """A figure of a row, for each seed that has it."""
    found = []
    for result in results:
        value: Any = result[part].get(name)
        for key in path if value is not None else ():
            value = value[key]
        if value is not None:
            found.append(float(value))
    return found


def around(numbers: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval; nan for one value."""
    if len(numbers) < 2:
        return float(np.mean(numbers)), float("nan")
    width = student.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / np.sqrt(len(numbers))
    return float(np.mean(numbers)), float(width)


def cell(numbers: Sequence[float], spread: bool = False) -> str:
    """A mean with its interval, and with the standard deviation if wanted."""
    if not numbers:
        return "–"
    mean, half = around(numbers)
    digits = 3 if abs(mean) < 1 else 1
    if np.isnan(half):
        return f"{mean:.{digits}f}"
    sd = f" ({np.std(numbers, ddof=1):.{digits}f})" if spread else ""
    return f"{mean:.{digits}f} ± {half:.{digits}f}{sd}"


def _table(
    results: Results, part: str, columns: Sequence[tuple[str, Sequence[Any]]], seeds_of: Sequence[Any] = ()
) -> str:
    heads = [name for name, _ in columns] + (["by seed"] if seeds_of else [])
    rows = [f"| | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
    present = {name for result in results for name in result[part]}
    for name in (n for n in NAMES if n in present):
        cells = [cell(values(results, part, name, path), path == seeds_of) for _, path in columns]
        if seeds_of:
            cells.append(", ".join(f"{value:.1f}" for value in values(results, part, name, seeds_of)))
        rows.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _closed(results: Results) -> str:
    rows = ["| | closed, % | by seed | E_g-mpjpe against the control | in every seed |", "|---|---|---|---|---|"]
    for name in MEANING:
        both = [r["closed"] for r in results if {name, "simulator", "real"} <= set(r["closed"])]
        if name in ("simulator", "real") or not both:
            continue
        error = {n: np.array([row[n]["all"]["g_mpjpe"] for row in both]) for n in (name, "simulator", "real")}
        won, whole = error["simulator"] - error[name], error["simulator"] - error["real"]
        each = ", ".join(f"{100 * share:.0f}" for share in won / whole)
        mean, half = around(list(-won))
        always = "better" if (won > 0).all() else "worse" if (won < 0).all() else "mixed"
        share = 100 * won.mean() / whole.mean()
        rows.append(f"| {MEANING[name]} | {share:.0f} | {each} | {mean:+.1f} ± {half:.1f} | {always} |")
    return "\n".join(rows)
