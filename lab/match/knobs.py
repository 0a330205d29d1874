"""Knobs: the numbers by which an arm can be sized, and their places in its composition.

``d_ff``     widths of the feed-forward blocks that every token uses: dense ones, and shared experts. All change by the
             same amount, so each layer compensates for its own attention: parameters, active parameters and
             FLOPs then match at once.
``d_expert`` width of one routed expert. Shared experts keep their ratio to it: two experts' worth stays two.
``n_experts`` routed experts; the number per token stays.
``d_model``  width of the residual stream. Explicit widths stay; those derived from it (a head's) follow.
``n_layers`` depth. A layout that names layers one by one allows few depths.
A dotted path (``model.attention.n_kv_heads``) is a knob too, for that number alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from blockwright import registry
from blockwright.blocks.compose import compose
from blockwright.blocks.cost import count_families
from blockwright.registry import ConfigError

# --- search for the integer at which a figure is nearest to a goal, with few measurements -----------------------------


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
            # The last multiple measured below the goal, or 0; the first above it, or the upper bound
            below = [v for v, f in self.figures.items() if f <= self.goal and v % multiple == 0]
            above = [v for v, f in self.figures.items() if f >= self.goal and v % multiple == 0]
            low, high = max(below, default=0), min(above, default=self.top)
            guess = self._guess(low, high, multiple, halve=turn % 4 == 3)
            if guess is None or not self._measure_near(guess, low, high, multiple):
                return

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


KNOBS = ("d_ff", "d_model", "n_layers", "n_experts", "d_expert")
WIDTHS = (64, 32, 16, 8, 4, 2, 1)  # efficient for matrix multiplication, coarsest first
COUNTS = (8, 4, 2, 1)
MULTIPLES = {"d_ff": WIDTHS, "d_expert": WIDTHS, "d_model": WIDTHS, "n_experts": COUNTS, "n_layers": (1,)}
MOST = {"n_layers": 1024, "n_experts": 2**16}  # each layer is built (on the meta device) to be measured
WANTS = {
    "d_ff": "a dense ffn or a shared expert with a d_ff",
    "d_expert": "experts with a d_ff, in an ffn that has experts",
    "n_experts": "an ffn with n_experts",
}

Keys = tuple[str | int, ...]


@dataclass(frozen=True)
class Place:
    """The place of a number in a composition.

    Args:
        keys: path from the model's node
        value: its current value
    """

    keys: Keys
    value: int

    @property
    def path(self) -> str:
        return ".".join(map(str, ("model", *self.keys)))


@dataclass(frozen=True)
class Knob:
    """Numbers that change together.

    Args:
        name: as on the command line
        places: the search varies the first
        together: whether the others change by the same amount, or in proportion
        multiples: allowed multiples of the first, coarsest first
        largest: maximum of the first
    """

    name: str
    places: tuple[Place, ...]
    together: Literal["by as much", "in proportion"]
    multiples: tuple[int, ...]
    largest: int = LARGEST

    @property
    def value(self) -> int:
        return self.places[0].value

    def at(self, value: int) -> dict[Keys, int]:
        """All numbers when the first is ``value``; the others are rounded to its own multiple, up to 64."""
        unit, moved = math.gcd(value, 64), {}
        for place in self.places:
            by_as_much = place.value + value - self.value
            exact = by_as_much if self.together == "by as much" else place.value * value / self.value
            moved[place.keys] = value if place is self.places[0] else max(unit, round(exact / unit) * unit)
        return moved


def find(model: Mapping[str, Any], name: str) -> Knob:
    """Find a knob in a composition.

    Args:
        model: from ``blockwright.blocks.compose.check``
        name: one of ``KNOBS``, or a dotted path to a number

    Raises:
        ConfigError: there is no such knob, or the model does not have it
    """
    if name in ("d_model", "n_layers"):
        return Knob(name, (Place((name,), model[name]),), "by as much", MULTIPLES[name], MOST.get(name, LARGEST))
    if name in KNOBS:
        places = _places(model, name)
        if not places:
            has = ", ".join(knobs_of(model))
            raise ConfigError("by", name, f"needs {WANTS[name]}, but this arm has none", f"It has: {has}")
        together: Literal["by as much", "in proportion"] = "by as much" if name == "d_ff" else "in proportion"
        return Knob(name, _with_values(model, places), together, MULTIPLES[name], MOST.get(name, LARGEST))
    if not name.startswith("model."):
        remedy = f"{registry.did_you_mean(name, KNOBS)}, or a dotted path such as model.ffn.d_ff"
        raise ConfigError("by", name, "is not a knob", remedy)
    return _dotted(model, name)


def knobs_of(model: Mapping[str, Any]) -> list[str]:
    """The named knobs that a composition has."""
    return [name for name in KNOBS if name in ("d_model", "n_layers") or _places(model, name)]


def changed(model: Mapping[str, Any], settings: Mapping[Keys, int]) -> dict[str, Any]:
    """The composition with numbers set; a block written as a bare name becomes a node."""
    copied = copy.deepcopy(dict(model))
    for keys, value in settings.items():
        node: Any = copied
        for key in keys[:-1]:
            if isinstance(node[key], str):
                node[key] = {"name": node[key]}
            node = node[key]
        node[keys[-1]] = value
    return copied


def _dotted(model: Mapping[str, Any], name: str) -> Knob:
    keys: list[str | int] = []
    node: Any = model
    for key in name.split(".")[1:]:
        at: str | int = int(key) if isinstance(node, list) and key.isdigit() else key
        known = node if isinstance(node, Mapping) else range(len(node)) if isinstance(node, list) else ()
        if at not in known:
            where = ".".join(map(str, ("model", *keys)))
            remedy = registry.did_you_mean(key, map(str, known), f"{where} holds a plain value")
            raise ConfigError("by", name, f"there is no {key!r} in this arm's {where}", remedy)
        keys.append(at)
        node = node[at]
    if node is None and keys[-1] == "d_ff":
        (place,) = _with_values(model, [(tuple(keys), None)])
    elif isinstance(node, int) and not isinstance(node, bool) and node > 0:
        place = Place(tuple(keys), node)
    else:
        raise ConfigError("by", name, f"is {node!r} in this arm, but a knob is a whole number above 0", "Name another")
    multiples = WIDTHS if str(keys[-1]).startswith("d_") else (1,)
    return Knob(name, (place,), "by as much", multiples)


# --- finding their places ---------------------------------------------------------------------------------------------


def _places(model: Mapping[str, Any], name: str) -> list[tuple[Keys, int | None]]:
    if name == "d_ff":
        return [place for keys, node in _nodes(model, "ffn") for place in _dense(keys, node)]
    mixtures = [(keys, node) for keys, node in _nodes(model, "ffn") if "experts" in _children(node).values()]
    if name == "n_experts":
        return [_number("ffn", keys, node, name) for keys, node in mixtures if name in _parameters("ffn", node)]
    if not mixtures:
        return []
    inline = [((*keys, "experts"), node["experts"]) for keys, node in mixtures if node.get("experts")]
    experts = [(keys, node) for keys, node in [*_nodes(model, "experts"), *inline] if _has_width("experts", node)]
    shared = [place for keys, node in mixtures for place in _dense(keys, node)]
    return [*(_number("experts", keys, node, "d_ff") for keys, node in experts), *(shared if experts else [])]


def _nodes(model: Mapping[str, Any], kind: str) -> Iterator[tuple[Keys, Any]]:
    """Every node of a kind: the model's own, its variants' and its overrides'."""
    if model.get(kind) is not None:
        yield (kind,), model[kind]
    for name, node in ((model.get("variants") or {}).get(kind) or {}).items():
        yield ("variants", kind, name), node
    for i, override in enumerate(model.get("overrides") or []):
        if override.get(kind) is not None:
            yield ("overrides", i, kind), override[kind]


def _dense(keys: Keys, node: Any) -> Iterator[tuple[Keys, int | None]]:
    """Widths in a feed-forward node: its own, and those of nested feed-forward blocks."""
    if _has_width("ffn", node):
        yield _number("ffn", keys, node, "d_ff")
    for child, kind in _children(node).items():
        if kind == "ffn" and isinstance(node, Mapping) and node.get(child) is not None:
            yield from _dense((*keys, child), node[child])


def _has_width(kind: str, node: Any) -> bool:
    if isinstance(node, Mapping) and "name" not in node:  # a patch of a node elsewhere
        return node.get("d_ff") is not None
    return "d_ff" in _parameters(kind, node)


def _parameters(kind: str, node: Any) -> Mapping[str, Any]:
    name = node if isinstance(node, str) else node.get("name")
    return registry.lookup(kind, name).schema.parameters if name in registry.names(kind) else {}


def _children(node: Any) -> dict[str, str]:
    """Parameter → kind, of the children of a feed-forward node."""
    return {name: p.child for name, p in _parameters("ffn", node).items() if p.child}


def _number(kind: str, keys: Keys, node: Any, name: str) -> tuple[Keys, int | None]:
    """Its place and value; None if the block computes a default."""
    written = {} if isinstance(node, str) else node
    parameter = _parameters(kind, node).get(name)
    return (*keys, name), written.get(name, None if parameter is None or parameter.required else parameter.default)


def _with_values(model: Mapping[str, Any], places: list[tuple[Keys, int | None]]) -> tuple[Place, ...]:
    return tuple(Place(keys, _default(model, keys) if value is None else value) for keys, value in places)


def _default(model: Mapping[str, Any], keys: Keys) -> int:
    """The default width that a block computes, inferred from its number of parameters.

    Raises:
        ConfigError: it cannot be inferred
    """

    def parameters(width: int | None) -> int:
        there = model if width is None else changed(model, {keys: width})
        return sum(count_families(compose(there, device="meta")).values())

    own, one, two = (parameters(width) for width in (None, 64, 128))
    slope = (two - one) / 64
    width = round(64 + (own - one) / slope) if slope else 0
    if width < 1 or parameters(width) != own:
        path = Place(keys, 0).path
        raise ConfigError("by", path, "is not set in this arm, and cannot be inferred from its size", f"Write {path}=")
    return width
