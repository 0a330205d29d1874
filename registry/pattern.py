"""Parse layer patterns (one block name per layer) and layer selectors. The language is described in layout.py."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from blockwright.registry.errors import ConfigError

NAME = r"[a-z][a-z0-9_]*"
MAX_NESTING = 16
_FILL = 0  # no valid repeat count, and contributes no fixed layers
_TOKEN = re.compile(
    rf"""(?P<name>{NAME})
    | (?P<before>[0-9]+)\*
    | \*(?P<after>[0-9]+)(?!\w)
    | (?P<fill>\*)(?=[\s,)]|\Z)     # a star glued to what follows is a typo: `a*b`, `a*3b`
    | (?P<open>\() | (?P<close>\))
    | [\s,]+
    | (?P<unreadable>.+)""",
    re.VERBOSE | re.DOTALL,
)
_RANGE = re.compile(r"\s*(-?[0-9]{1,9})\s*\.\.\s*(-?[0-9]{1,9})\s*")


class _Part(NamedTuple):
    """A name or a group, its number of layers, and its repeats: measured before expansion."""

    unit: str | list[_Part]
    size: int
    times: int


class _Parser:
    """Recursive descent: sequence = part+; part = [count*] unit | unit [*count | *]; unit = name | ( sequence )."""

    def __init__(self, pattern: Any, n_layers: int, path: str) -> None:
        self.pattern, self.n_layers, self.path = pattern, n_layers, path
        self.tokens: list[tuple[str, str]] = []  # (kind, text), a stack with the next token last

    def refusal(self, what: str, remedy: str) -> ConfigError:
        rule = f"a pattern names n_layers = {self.n_layers} layers, {what}"
        return ConfigError(self.path, self.pattern, rule, remedy)

    def parse(self) -> list[_Part]:
        """The parts of all entries: groups do not span entries of a list."""
        entries = [self.pattern] if isinstance(self.pattern, str) else self.pattern
        if not isinstance(entries, Sequence) or not entries or not all(isinstance(entry, str) for entry in entries):
            remedy = "Write 'linear*3 full' or [linear, full]; quote a name that YAML takes for something else, like on"
            raise self.refusal("as text or as a list of texts", remedy)
        longest = 500 + 50 * self.n_layers
        if sum(len(entry) + 1 for entry in entries) > longest:
            self.pattern = f"{self.pattern!s:.60}..."  # keep errors short
            raise self.refusal(f"in at most {longest} characters", "Repeat with name*3 or (a b)*3")
        return [part for entry in entries for part in self._entry(entry)]

    def _entry(self, text: str) -> list[_Part]:
        tokens = [(match.lastgroup, match[match.lastgroup]) for match in _TOKEN.finditer(text) if match.lastgroup]
        self.tokens = tokens[::-1]
        if tokens and tokens[-1][0] == "unreadable":
            remedy = "Write names like full_2, in lower case and apart from each other: 'linear*3 full', 'dense moe*'"
            raise self.refusal(f"and {tokens[-1][1][:20]!r} cannot be read", remedy)
        parts = self._sequence(nesting=0)
        if self.tokens:
            raise self.refusal("but a ')' closes nothing", "Drop it, or open its group with '('")
        return parts

    def _take(self, kind: str) -> str | None:
        """Consume the next token if it is of this kind."""
        return self.tokens.pop()[1] if self.tokens and self.tokens[-1][0] == kind else None

    def _sequence(self, nesting: int) -> list[_Part]:
        if nesting > MAX_NESTING:
            raise self.refusal(f"in groups at most {MAX_NESTING} deep", "Drop parentheses")
        parts = [self._part(nesting)]
        while self.tokens and self.tokens[-1][0] != "close":
            parts.append(self._part(nesting))
        return parts

    def _part(self, nesting: int) -> _Part:
        before = self._take("before")
        unit = self._unit(nesting)
        size = 1 if isinstance(unit, str) else _fixed(unit)
        digits = before or self._take("after")
        if digits:
            # Check the length first: Python refuses to convert numbers with thousands of digits.
            if len(digits) > 9 or not 1 <= int(digits) <= self.n_layers:
                remedy = f"Repeat 1 to {self.n_layers} times, or end the part in a bare * to fill what is left"
                raise self.refusal(f"but a part is repeated {digits:.20} times", remedy)
            return _Part(unit, size, int(digits))
        if not self._take("fill"):
            return _Part(unit, size, 1)
        if nesting:
            raise self.refusal("but a bare * in a group has no room of its own to fill", "Write a count there: name*3")
        return _Part(unit, size, _FILL)

    def _unit(self, nesting: int) -> str | list[_Part]:
        name = self._take("name")
        if name:
            return name
        if not self._take("open"):
            found = f"{self.tokens[-1][1]!r:.20} is" if self.tokens else "nothing is"
            raise self.refusal(f"but {found} where a name is expected", "Write name, name*3, name* or (a b)*3 there")
        group = self._sequence(nesting + 1)
        if not self._take("close"):
            raise self.refusal("but a '(' is never closed", "Close its group with ')'")
        return group


def _fixed(parts: Iterable[_Part]) -> int:
    return sum(part.size * part.times for part in parts)


def _spell(parts: Iterable[_Part]) -> list[str]:
    spelt: list[str] = []
    for unit, _, times in parts:
        spelt += ([unit] if isinstance(unit, str) else _spell(unit)) * times
    return spelt


def expand(pattern: str | Sequence[str], n_layers: int, path: str) -> list[str]:
    """Expand a pattern.

    Args:
        pattern: text in the language above, or a list of such texts
        n_layers: the depth, at least 1
        path: configuration path of the pattern, for the error

    Returns:
        One name per layer, n_layers of them.

    Raises:
        ConfigError: the pattern is invalid or does not give n_layers; checked before any long list is built.
    """
    parser = _Parser(pattern, n_layers, path)
    parts = parser.parse()
    fixed, fillers = _fixed(parts), [part for part in parts if part.times == _FILL]
    if len(fillers) > 1:
        raise parser.refusal(
            "and only one part can fill what is left", "Keep one bare *, give the others a count: name*3"
        )
    if fixed > n_layers:
        raise parser.refusal(f"but this one names {fixed}", f"Take {fixed - n_layers} off, or raise n_layers")
    if not fillers:  # tiling is one group that fills
        parts = fillers = [_Part(parts, fixed, _FILL)]
        fixed = 0
    size, room = fillers[0].size, n_layers - fixed
    times, odd = divmod(room, size)
    # Only a single name may fill zero layers. An incomplete or missing period would be another model.
    if odd or (size > 1 and not times):
        fits = [n_layers - odd] * (times > 0) + [n_layers - odd + size]
        remedy = f"Let a single name end in a bare * to fill any room, or set n_layers to {' or '.join(map(str, fits))}"
        raise parser.refusal(f"but {size} at a time cannot fill {room} of them", remedy)
    return _spell(part._replace(times=times) if part.times == _FILL else part for part in parts)


def select(selector: int | str | Sequence[int | str], n_layers: int, path: str) -> list[int]:
    """The layers selected by an override.

    Args:
        selector: a layer (-1 is the last), ``"a..b"`` with both ends, or a list of these
        n_layers: the depth, at least 1
        path: configuration path of the selector, for the error

    Returns:
        Layer indices from 0, ascending, each once.

    Raises:
        ConfigError: it selects nothing, or a layer that does not exist.
    """

    def refusal(what: str, remedy: str) -> ConfigError:
        return ConfigError(path, selector, f"n_layers = {n_layers} has layers 0..{n_layers - 1}, {what}", remedy)

    def layer(index: int) -> int:
        if not -n_layers <= index < n_layers:
            remedy = (
                f"Write 0 to {n_layers - 1}, or -1 for the last; a range is a..b, since YAML reads 1:4 as the number 64"
            )
            raise refusal(f"and {index} is not one of them", remedy)
        return index % n_layers

    def layers(item: Any) -> Iterable[int]:
        if isinstance(item, int) and not isinstance(item, bool):
            return [layer(item)]
        ends = _RANGE.fullmatch(item) if isinstance(item, str) else None
        if not ends:
            remedy = "Write a layer, 3 or -1, a range with both ends, 0..2, or a list of these"
            if isinstance(item, str) and ":" in item:
                remedy = "Write a..b, with both ends: YAML reads some a:b as a number (1:4 is 64)"
            raise refusal(f"and {item!r:.40} selects none", remedy)
        first, last = (layer(int(end)) for end in ends.groups())
        if first > last:
            raise refusal(f"and {item!r} runs backwards, from {first} to {last}", f"Write {last}..{first}")
        return range(first, last + 1)

    items = selector if isinstance(selector, Sequence) and not isinstance(selector, str) else [selector]
    chosen = sorted({index for item in items for index in layers(item)})
    if not chosen:
        raise refusal("and an empty list selects none", "Name a layer, or drop the override")
    return chosen
