"""The page of a study: tables of means and intervals over seeds, and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from blockwright_asap.measures import HORIZONS
from blockwright_asap.methods import MEANING
from blockwright_asap.robot import DT, JOINTS
from blockwright_asap.story import RESULT

NAMES = {
    "vanilla in the simulator": "not tuned, in the simulator",
    "vanilla": "not tuned",
    "fixed point": "not tuned: delta action undone at run time",
    "floor": "the real physics, motor state unknown (floor)",
    **MEANING,
}
RELATIVE = (("E_mpjpe", "mpjpe"), ("E_acc", "acc"), ("E_vel", "vel"))
Results = Sequence[Mapping[str, Any]]


def write(folder: Path, tune: int) -> Path:
    """``report.md`` and its plots, from the results of all seeds in a folder."""
    results = [json.loads(file.read_text()) for file in sorted(folder.glob(f"*/{RESULT}"))]
    replayed = [(f"{s} s", (s, "g_mpjpe")) for s in HORIZONS]
    replayed += [(name, ("1.0", key)) for name, key in RELATIVE]
    deployed = [("success, %", ("all", "success")), ("E_g-mpjpe", ("all", "g_mpjpe"))]
    deployed += [(name, ("all", key)) for name, key in RELATIVE]
    parts = [
        "# Real to simulation and back",
        f"{len(results)} seeds; means ± half of the 95 % interval over seeds (t). E in mm, mm/frame², mm/frame.",
        "## Open loop: held-out real rollouts replayed in the corrected simulator, E_g-mpjpe",
        _table(results, "open", replayed),
        f"## Closed loop: tuned for {tune} iterations where the row says, deployed in the real",
        _table(results, "closed", deployed),
        _closed(results),
        "## Size of the correction by joint",
        _table(results, "size", [(joint, ("joints", i)) for i, joint in enumerate(JOINTS)]),
    ]
    _plots(results, folder)
    file = folder / "report.md"
    file.write_text("\n\n".join([*parts, "![open loop](open_loop.svg)", "![closed loop](closed_loop.svg)"]) + "\n")
    return file


def _values(results: Results, part: str, name: str, path: Sequence[Any]) -> list[float]:
    found = []
    for result in results:
        value: Any = result.get(part, {}).get(name)
        for key in path if value is not None else ():
            value = value[key]
        if value is not None:
            found.append(float(value))
    return found


def around(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval; nan for one value."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    width = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values)), float(width)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, half = around(values)
    digits = 3 if abs(mean) < 1 else 1
    return f"{mean:.{digits}f}" if np.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def _table(results: Results, part: str, columns: Sequence[tuple[str, Sequence[Any]]]) -> str:
    rows = [f"| | {' | '.join(name for name, _ in columns)} |", f"|---{'|---' * len(columns)}|"]
    present = dict.fromkeys(name for result in results for name in result.get(part, {}))
    for name in sorted(present, key=list(NAMES).index):
        cells = [_cell(_values(results, part, name, path)) for _, path in columns]
        rows.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _closed(results: Results) -> str:
    """How much of the way from the control to tuning in the real each method closes, paired by seed."""
    lines = [
        "Share of the way from the control to tuning in the real, and the difference to the control, paired by seed:",
        "",
    ]
    for name in MEANING:
        rows = [r["closed"] for r in results if {name, "simulator", "real"} <= set(r.get("closed", {}))]
        if name in ("simulator", "real") or not rows:
            continue
        error = {n: np.array([row[n]["all"]["g_mpjpe"] for row in rows]) for n in (name, "simulator", "real")}
        share = (error["simulator"].mean() - error[name].mean()) / (error["simulator"].mean() - error["real"].mean())
        mean, half = around(list(error[name] - error["simulator"]))
        lines.append(f"* {MEANING[name]}: {100 * share:.0f} %; {mean:+.1f} ± {half:.1f} mm")
    return "\n".join(lines)


def _plots(results: Results, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    for name in (n for n in NAMES if any(n in r.get("open", {}) for r in results)):
        lines = np.array([r["open"][name]["over_time"] for r in results if name in r.get("open", {})])
        at = np.arange(1, lines.shape[1] + 1) * DT
        (line,) = axes.plot(at, lines.mean(0), label=NAMES[name])
        if len(lines) > 1:
            half = np.array([around(list(column))[1] for column in lines.T])
            axes.fill_between(at, lines.mean(0) - half, lines.mean(0) + half, alpha=0.12, color=line.get_color())
    axes.set(xlabel="replayed, s", ylabel="E_g-mpjpe, mm", title="Open loop", ylim=(0, None))
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(folder / "open_loop.svg")
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.subplots()
    rows = [(NAMES[n], _values(results, "closed", n, ("all", "g_mpjpe"))) for n in NAMES]
    rows = [row for row in rows if row[1]]
    found = [around(values) for _, values in rows]
    axes.barh([name for name, _ in rows], [m for m, _ in found], xerr=[0 if np.isnan(h) else h for _, h in found])
    axes.invert_yaxis()
    axes.set(xlabel="E_g-mpjpe in the real, mm", title="Closed loop")
    figure.savefig(folder / "closed_loop.svg")
