"""Heat map of the experts' load of an arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from blockwright.lab.report.figure import Figure
from blockwright.lab.report.findings import Finding
from blockwright.lab.report.svg import Chart
from blockwright.lab.report.words import seeds

ROW = 20  # pixels of a layer


def experts(index: int, finding: Finding) -> Figure | None:
    """Load of each expert relative to the even load, a row per layer, mean over seeds."""
    loads = [run.curves.get("expert_load") for run in finding.runs if run.seed in finding.values]
    rows = _mean_loads([load for load in loads if load])
    if not rows:
        return None
    chart = load_map(f"experts-{index}", f"Expert load of {finding.name}", rows)
    flat = [load for row in rows.values() for load in row]
    caption = (
        f"What went to each expert over the even share, mean of {seeds(len(loads))}: from {min(flat):.2f} to "
        f"{max(flat):.2f}. Without colour is even; blue is less, orange is more, full at nothing and at twice."
    )
    return Figure(chart, f"{finding.name}: load of the experts", caption)


def load_map(name: str, title: str, rows: Mapping[str, Sequence[float]]) -> Chart:
    """A row of cells per layer, an expert each, coloured by its load relative to the even load."""
    width = max(map(len, rows.values()))
    chart = Chart(name, title, ROW * len(rows) + 50, left=58, right=14, top=8)
    across = (chart.x1 - chart.x0) / width
    for r, (layer, row) in enumerate(rows.items()):
        chart.add("text", "tick end", f"layer {layer}", x=chart.x0 - 7, y=chart.y1 + ROW * r + 14)
        for e, load in enumerate(row):
            tip = f"layer {layer}, expert {e}: {load:.2f} of the even load"
            _cell(chart, chart.x0 + across * e, chart.y1 + ROW * r, max(across - 1, 0.5), load, tip)
    for e in range(0, width, max(1, math.ceil(width / 12))):
        chart.add("text", "tick mid", str(e), x=chart.x0 + across * (e + 0.5), y=chart.y0 + 15)
    chart.add("text", "name mid", "expert", x=(chart.x0 + chart.x1) / 2, y=chart.height - 6)
    return chart


def _mean_loads(loads: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Layer → load of each expert relative to the even load, for layers equal in all runs."""
    if not loads:
        return {}
    alike = [k for k, first in loads[0].items() if all(len(load.get(k, ())) == len(first) > 0 for load in loads)]
    columns = {layer: list(zip(*(load[layer] for load in loads), strict=True)) for layer in alike}
    return {k: [math.fsum(c) / len(c) * len(columns[k]) for c in columns[k]] for k in alike}


def _cell(chart: Chart, x: float, y: float, width: float, load: float, tip: str) -> None:
    for cls, opacity in (("frame", 1.0), ("over" if load > 1 else "under", min(1.0, abs(load - 1)))):
        label = tip if cls != "frame" else ""
        chart.add("rect", cls, tip=label, x=x, y=y, width=width, height=ROW - 1.0, fill_opacity=opacity)
