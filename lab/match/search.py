"""Search for the integer at which a figure is nearest to a goal, with few measurements.

A figure that grows with a width is nearly linear in it, and one that grows with d_model nearly quadratic, so a secant
is within a step or two; the bracket is then searched in ever finer multiples. The figure need only be monotone.
Numbers for which nothing can be built (a d_model that heads do not divide) are skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LARGEST = 2**24  # above any width
HOLES = 32  # neighbours tried on either side for one that can be built


@dataclass(frozen=True)
class Found:
    """Result of a search.

    Args:
        value: the number
        figure: the figure measured there
        multiple: the coarsest allowed multiple that reached the goal, else the finest
        measured: number of measurements, without the start
    """

    value: int
    figure: float
    multiple: int
    measured: int


class UnmovedError(Exception):
    """The figure does not depend on the number."""


def nearest(
    measure: Callable[[int], float | None],
    start: int,
    figure: float,
    goal: float,
    multiples: Sequence[int],
    tol: float,
    largest: int = LARGEST,
) -> Found:
    """Search.

    Args:
        measure: number → figure, monotone in it; None if it cannot be measured
        start: first number
        figure: the figure at the start
        goal: the desired figure, above 0
        multiples: allowed multiples of the number, coarsest first; each divides the one before
        tol: relative deviation from the goal below which no finer multiple is tried
        largest: maximum of the number

    Returns:
        the nearest multiple of the coarsest kind that has one within ``tol``, or of the finest

    Raises:
        UnmovedError: the figure does not depend on the number
    """
    search = _Search(measure, goal, {start: figure}, max(largest, start) + 1)
    for multiple in multiples:
        search.narrow(multiple)
        tried = {v: f for v, f in search.figures.items() if v % multiple == 0}
        if not tried:
            continue
        value = min(tried, key=lambda v: (abs(tried[v] - goal), v))
        if abs(tried[value] / goal - 1) <= tol:
            break
    if not tried:  # only the start can be built
        value, tried = start, search.figures
    return Found(value, tried[value], multiple, len(search.figures) - 1 + len(search.holes))


@dataclass
class _Search:
    measure: Callable[[int], float | None]
    goal: float
    figures: dict[int, float]
    top: int  # exclusive upper bound
    holes: set[int] = field(default_factory=set)
    limited: bool = False  # whether top was found too large to build

    def at(self, value: int) -> bool:
        """Measure at a value; returns whether that is possible."""
        if value in self.figures or value in self.holes:
            return value in self.figures
        figure = self.measure(value)
        if figure is None:
            self.holes.add(value)
            return False
        self.figures[value] = figure
        return True

    def narrow(self, multiple: int) -> None:
        """Measure until no buildable multiple lies between the last below the goal and the first above it."""
        for turn in range(200):
            low, high = self._between(multiple)
            guess = self._guess(low, high, multiple, halve=turn % 4 == 3)
            if guess is None or not self._measure_near(guess, low, high, multiple):
                return

    def _between(self, multiple: int) -> tuple[int, int]:
        """The last multiple measured below the goal, or 0; the first above it, or the upper bound."""
        below = [v for v, f in self.figures.items() if f <= self.goal and v % multiple == 0]
        above = [v for v, f in self.figures.items() if f >= self.goal and v % multiple == 0]
        return max(below, default=0), min(above, default=self.top)

    def _guess(self, low: int, high: int, multiple: int, halve: bool) -> int | None:
        """Where to measure next, strictly between the two; None if there is no multiple."""
        first, last = low // multiple + 1, -(-high // multiple) - 1
        if first > last:
            return None
        points = sorted(self.figures)
        if len(points) == 1:
            wanted: float = points[0] + (multiple if self.figures[points[0]] <= self.goal else -multiple)
        elif low and ((self.limited and high == self.top) or (halve and high < self.top)):
            wanted = (low + high) / 2
        else:
            wanted = self._secant(points, low, high, multiple)
        return min(max(round(wanted / multiple), first), last) * multiple

    def _secant(self, points: Sequence[int], low: int, high: int, multiple: int) -> float:
        """Where the line through two points, around the goal if possible, reaches it."""
        upwards = self.figures[points[0]] <= self.goal
        a, b = (low, high) if low and high < self.top else (points[-2:] if upwards else points[:2])
        slope = (self.figures[b] - self.figures[a]) / (b - a)
        if not slope:
            if points[-1] > 8 * points[0] or (not upwards and points[0] <= multiple):
                raise UnmovedError
            return 2 * points[-1] + multiple if upwards else points[0] / 2
        wanted = b + (self.goal - self.figures[b]) / slope
        return wanted if math.isfinite(wanted) else 2 * b

    def _measure_near(self, guess: int, low: int, high: int, multiple: int) -> bool:
        """Measure the nearest buildable multiple, strictly between the two."""
        for away in range(HOLES):
            for value in (guess - away * multiple, guess + away * multiple):
                if low < value < high and value not in self.holes and self.at(value):
                    return True
        if high == self.top:  # too large to build
            self.top, self.limited = guess, True
        return high > self.top
