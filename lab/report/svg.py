"""Charts as SVG elements with classes, coloured by chart.css in light and dark mode.

ElementTree writes them, so names are escaped. matplotlib's SVG would lose what these have: tooltips, colours that
follow dark mode, labels that keep out of each other's way and are legible on a phone. Its files are four times as
large, and it takes half a second to load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count as counting
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from blockwright.lab.report.words import MINUS

if TYPE_CHECKING:
    from blockwright.lab.report.findings import Finding, Findings

# --- scales from values to pixels, and the ticks of an axis -----------------------------------------------------------


SLACK = 1e-9  # share of an axis that is lost to rounding
POWERS = ((1,), (1, 3), (1, 2, 5))  # multiples of powers of ten, the fewest first


@dataclass(frozen=True)
class Scale:
    """A mapping from values to pixels.

    Args:
        low, high: values at the ends
        start, end: pixels there
        log: whether equal ratios are equal distances
        whole: True for counts, whose ticks are whole numbers
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (at - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int) -> list[float]:
        """Round values within the scale, about as many as ``most``."""
        found = self._powers() if self.log else []
        if len(found) >= 3:
            return found[:: max(1, round(len(found) / (most + 1)))]
        step = _step((self.high - self.low) / most, self.whole)
        slack = SLACK * (self.high - self.low)
        first, last = math.ceil((self.low - slack) / step), math.floor((self.high + slack) / step)
        return [n * step for n in range(first, last + 1)]

    def _powers(self) -> list[float]:
        """At least three multiples of powers of ten, if the scale holds as many."""
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = ([m * 10.0**e for e in exponents for m in multiples] for multiples in POWERS)
        held = ([v for v in values if self.low * (1 - SLACK) <= v <= self.high * (1 + SLACK)] for values in every)
        return next((values for values in held if len(values) >= 3), [])


def _step(least: float, whole: bool) -> float:
    """The smallest round distance between ticks of at least ``least``: 1, 2, 2.5 or 5 times a power of ten."""
    rounds = (m * 10.0**e for e in counting(math.floor(math.log10(least))) for m in (1, 2, 2.5, 5))
    return next(step for step in rounds if step >= least * (1 - SLACK) and (not whole or step == int(step)))


def padded(values: Sequence[float], share: float = 0.06, least: float = 0.0) -> tuple[float, float]:
    """A range slightly wider than the values, and at least ``least`` times their middle."""
    low, high = min(values), max(values)
    room = max((high - low) * (1 + 2 * share), least * abs(low + high) / 2, 1e-9 * abs(high) or 1.0)
    middle = (low + high) / 2
    return middle - room / 2, middle + room / 2


def spelt(values: Sequence[float]) -> list[str]:
    """Numbers of one axis, formatted with as many decimals as their distance requires."""
    if len(values) < 2:
        return [f"{v:.4g}" for v in values]
    step = min(b - a for a, b in pairwise(values))
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    if places and round(step * 10**places, 6) != round(step * 10**places):  # 0.025
        places += 1
    return [f"{0.0 if abs(v) < step / 1e6 else v:.{places}f}".replace("-", MINUS) for v in values]


WIDTH = 440  # a phone's width, so that text is legible there
LINE = 14  # pixels from one label to the next
RING = 3.5  # pixels of a ring's radius
ARROW = 9.0  # pixels of an arrow's length
Point = tuple[float, float]
CSS = Path(__file__).with_name("chart.css")


class Chart:
    """One chart: an ``<svg>`` with a title, a description and its elements.

    Args:
        name: of its file, and prefix of its internal ids
        title: for screen readers
        height: pixels
        left, right, top, bottom: margins
    """

    def __init__(
        self,
        name: str,
        title: str,
        height: float,
        left: float = 54,
        right: float = 18,
        top: float = 16,
        bottom: float = 42,
    ) -> None:
        self.name, self.title, self.height = name, title, height
        self.x0, self.x1, self.y0, self.y1 = left, WIDTH - right, height - bottom, top
        box = f"0 0 {WIDTH} {height:g}"
        self.root = ET.Element("svg", {"class": "chart", "viewBox": box, "role": "img", "aria-labelledby": f"{name}-t"})
        self.add("title", text=title, id=f"{name}-t")
        self.add("rect", cls="sheet", width=WIDTH, height=height)

    def add(
        self,
        tag: str,
        cls: str = "",
        text: str | None = None,
        into: ET.Element | None = None,
        tip: str = "",
        **attributes: object,
    ) -> ET.Element:
        """Draw an element; ``tip`` is its tooltip."""
        found = {k.replace("_", "-"): f"{v:.2f}" if isinstance(v, float) else str(v) for k, v in attributes.items()}
        element = ET.SubElement(self.root if into is None else into, tag, {"class": cls} if cls else {}, **found)
        element.text = text
        if tip:
            ET.SubElement(element, "title").text = tip
        return element

    def axes(
        self,
        x: Scale,
        y: Scale | None,
        label: str,
        above: str = "",
        written: Callable[[float], str] | None = None,
        y_written: Callable[[float], str] | None = None,
    ) -> None:
        """Draw grid, ticks and labels; ``above`` labels the y axis, the last two format the ticks of x and y.

        Curves and marks that follow are in values of these scales.
        """
        self.x = x
        if y is not None:
            self.y = y
            marks = y.ticks(5)
            words = [y_written(v) for v in marks] if y_written else spelt(marks)
            for value, word in zip(marks, words, strict=True):
                self.add("line", "grid", x1=self.x0, x2=self.x1, y1=y(value), y2=y(value))
                self.add("text", "tick end", word, x=self.x0 - 7, y=y(value) + 4)
        marks = x.ticks(4)
        words = [written(v) for v in marks] if written else spelt(marks)
        for value, word in zip(marks, words, strict=True):
            self.add("line", "tickmark", x1=x(value), x2=x(value), y1=self.y0, y2=self.y0 + 4)
            self.add("text", "tick mid", word, x=x(value), y=self.y0 + 17)
        self.add("line", "axis", x1=self.x0, x2=self.x1, y1=self.y0, y2=self.y0)
        self.add("text", "name mid", label, x=(self.x0 + self.x1) / 2, y=self.height - 6)
        if above:
            self.add("text", "name", above, x=4.0, y=self.y1 - 14)
        clip = self.add("clipPath", id=f"{self.name}-clip")
        self.add("rect", into=clip, x=self.x0, y=self.y1, width=self.x1 - self.x0, height=self.y0 - self.y1)
        self._area = self.add("g", clip_path=f"url(#{self.name}-clip)")

    def legend(self, names: Sequence[tuple[str, str]]) -> None:
        """Name and classes of each curve or ring, one below the other at the upper right, outside the axes."""
        for i, (name, cls) in enumerate(names):
            at = self.y1 + LINE * i
            if cls.startswith("ring"):
                self.add("circle", cls, cx=self.x1 + 14, cy=at, r=RING)
            else:
                self.add("line", cls, x1=self.x1 + 8, x2=self.x1 + 20, y1=at, y2=at)
            self.add("text", "tick", cut(name, 18), tip=name, x=self.x1 + 24, y=at + 4)

    def at(self, point: Point) -> Point:
        """The pixels of a point in values."""
        return self.x(point[0]), self.y(point[1])

    def curve(self, points: Sequence[Point], cls: str, tip: str = "") -> None:
        """A line through points in values, clipped to the axes."""
        self.path([self.at(point) for point in points], cls, self._area, tip)

    def mark(self, cls: str, point: Point, radius: float, tip: str) -> None:
        """A circle at a point in values, unless it lies above or below the axes."""
        px, py = self.at(point)
        if self.y1 - 1 <= py <= self.y0 + 1:
            self.add("circle", cls, cx=px, cy=py, r=radius, tip=tip)

    def path(self, points: Sequence[Point], cls: str, into: ET.Element | None = None, tip: str = "") -> None:
        """A line through pixels."""
        if len(points) > 1:
            self.add("path", cls, into=into, tip=tip, d="M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in points))

    def bar(self, cls: str, start: Point, end: Point, tip: str = "") -> None:
        """A bar between two points, with an arrow at an end that lies beyond the axes."""
        ends = [(min(max(px, self.x0), self.x1), min(max(py, self.y1), self.y0)) for px, py in (start, end)]
        (x1, y1), (x2, y2) = ends
        self.add("line", f"bar {cls}", tip=tip, x1=x1, x2=x2, y1=y1, y2=y2)
        for wanted, (cx, cy) in zip((start, end), ends, strict=True):
            dx, dy = (ARROW * ((a > b) - (a < b)) for a, b in zip(wanted, (cx, cy), strict=True))
            if dx or dy:
                sides = [(cx - dx + side * dy, cy - dy + side * dx) for side in (0.5, -0.5)]
                self.path([(cx, cy), *sides, (cx, cy)], f"arrow {cls}")

    def inline(self) -> str:
        """SVG for a page with the style sheet."""
        return ET.tostring(self.root, encoding="unicode")


def standalone(*charts: Chart) -> str:
    """SVG of one or more charts, one below the other, for a file of its own."""
    height = sum(chart.height for chart in charts)
    about = charts[0].root.attrib if len(charts) == 1 else {"class": "chart", "role": "img"}
    root = ET.Element("svg", {**about, "viewBox": f"0 0 {WIDTH} {height:g}", "xmlns": "http://www.w3.org/2000/svg"})
    ET.SubElement(root, "style").text = CSS.read_text()
    top = 0.0
    for chart in charts:
        place = ET.SubElement(root, "svg", {"y": f"{top:g}", "width": str(WIDTH), "height": f"{chart.height:g}"})
        place.extend(list(chart.root))
        top += chart.height
    return ET.tostring(root, encoding="unicode") + "\n"


def apart(wanted: Sequence[float], low: float, high: float, least: float = LINE) -> list[float]:
    """Label positions as near as possible to the wanted ones, at least ``least`` apart, within the bounds."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    last = low - least
    for i in order:
        placed[i] = last = max(wanted[i], last + least)
    limit = high + least
    for i in reversed(order):
        placed[i] = limit = min(placed[i], limit - least)
    return placed


def cut(name: str, letters: int) -> str:
    """A name shortened in the middle, since names often differ at the end. The tables have the full name."""
    tail = letters // 3
    return name if len(name) <= letters else f"{name[: letters - tail - 1]}…{name[-tail:]}"


# --- a chart with its caption, and shared elements: colours of arms, names at the ends of lines -----------------------


COLOURS = 7  # distinguishable colours; further arms are grey
AT_END = 16  # letters of a name at the end of a line
LETTER = 7.4  # pixels of a label's letter, about


@dataclass(frozen=True)
class Figure:
    """A chart and its caption."""

    chart: Chart
    heading: str
    caption: str

    @property
    def file(self) -> str:
        return f"{self.chart.name}.svg"


def colour(finding: Finding, findings: Findings) -> str:
    """Class of an arm's colour: the baseline is drawn in ink."""
    return "s0" if finding.is_baseline else colour_of(1 + [f.name for f in findings.others].index(finding.name))


def colour_of(place: int) -> str:
    """Class of the colour of an arm by its place, the baseline's being 0."""
    return f"s{min(place, COLOURS + 1)}"


def label_room(findings: Findings) -> float:
    """Right margin for the arms' names."""
    return room_of([f.name for f in findings.arms])


def room_of(names: Sequence[str]) -> float:
    """Right margin for names."""
    return 26 + LETTER * max(len(cut(name, AT_END)) for name in names)


def end_labels(chart: Chart, ends: Sequence[tuple[str, str, Point]]) -> None:
    """Names to the right of the ends of curves.

    Args:
        chart: with axes
        ends: name, colour and last point of each curve, in values
    """
    pixels = [chart.at(point) for *_, point in ends]
    places = apart([min(max(py, chart.y1), chart.y0) for _, py in pixels], chart.y1, chart.y0)
    for (name, at, _), (ex, ey), place in zip(ends, pixels, places, strict=True):
        chart.add("line", f"leader {at}", x1=ex + 2, x2=chart.x1 + 10, y1=ey, y2=place)
        chart.add("text", "strong" if at == "s0" else "", cut(name, AT_END), tip=name, x=chart.x1 + 13, y=place + 4)


# --- what reports of arms and of one run share: where the axis of a loss ends, the load of experts --------------------


EARLY = 0.25  # fraction of a run whose fast fall of the loss would compress the rest of the axis
ROW = 20  # pixels of a layer


def load_map(name: str, title: str, rows: Mapping[str, Sequence[float]]) -> Chart:
    """A row of cells per layer, an expert each, coloured by its load relative to the even load."""
    width = max(map(len, rows.values()))
    chart = Chart(name, title, ROW * len(rows) + 50, left=58, right=14, top=8)
    across = (chart.x1 - chart.x0) / width
    for r, (layer, row) in enumerate(rows.items()):
        chart.add("text", "tick end", f"layer {layer}", x=chart.x0 - 7, y=chart.y1 + ROW * r + 14)
        for e, load in enumerate(row):
            tip = f"layer {layer}, expert {e}: {load:.2f} of the even load"
            x, y, cell = chart.x0 + across * e, chart.y1 + ROW * r, max(across - 1, 0.5)
            for cls, opacity in (("frame", 1.0), ("over" if load > 1 else "under", min(1.0, abs(load - 1)))):
                shown = tip if cls != "frame" else ""
                chart.add("rect", cls, tip=shown, x=x, y=y, width=cell, height=ROW - 1.0, fill_opacity=opacity)
    for e in range(0, width, max(1, math.ceil(width / 12))):
        chart.add("text", "tick mid", str(e), x=chart.x0 + across * (e + 0.5), y=chart.y0 + 15)
    chart.add("text", "name mid", "expert", x=(chart.x0 + chart.x1) / 2, y=chart.height - 6)
    return chart
