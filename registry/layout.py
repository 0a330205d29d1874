"""Which layer gets which block: one line of YAML a kind.

    layout:
      attention: linear*3 full       # no bare star: tiles the depth, which it must divide     L L L F L L L F
      ffn: dense moe*                # one bare star fills what is left, be it nothing         D M M M M M M M
      norm: rms (layer rms*2)* rms   # a group repeats or fills; it fills whole or is refused  R L R R L R R R
      residual: [pre*4, post*4]      # a list is the same language, an entry at a time; so are n_layers names
    variants: {ffn: {dense: {name: swiglu, d_ff: 512}, wide: {d_ff: 4096}}}   # bears a name: stands alone; else a patch
    overrides:                       # afterwards and in order
      - {layers: 0..1, attention: mla}              # a name, or a node with one, replaces
      - {layers: [2, -1], attention: {window: 64}}  # a node without a name patches what the layer has
      - {layers: 3, qk_norm: null}                  # null: none; here as in a variant

A name means the variant of that name, else the model's own node if that bears it, else the registered block; the
kind itself (`dense*1 ffn*`) means the model's own node whatever it is, so that swapping it on the command line reaches
every layer. A pattern that leaves a chosen own node unused is refused: an ablation that swaps it would compare nothing.
`3*full` is `full*3`, commas are spaces. A range is `0..1` and takes in both ends: YAML 1.1 reads 1:4 as 64.
Left out on purpose: parameters inside a pattern (a variant has them), two fillers (where they meet would be a guess), a
filler inside a group, a period that is cut off, and any say in what a node's keys mean: that is for the builder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from registry.errors import ConfigError, did_you_mean
from registry.schema import INHERIT

Node = dict[str, Any]

MAX_LAYERS = 10_000
MAX_NESTING = 16
_FILL = 0  # as a count no repeat can have, it also makes the filler weigh nothing among the fixed layers
_NAME = r"[a-z][a-z0-9_]*"
_TOKEN = re.compile(
    rf"""(?P<name>{_NAME})
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
    """A name or a group, how many layers that is, and how often it stands: measured before anything is spelt out."""

    unit: str | list[_Part]
    size: int
    times: int


class _Parser:
    """Recursive descent: sequence = part+; part = [count*] unit | unit [*count | *]; unit = name | ( sequence )."""

    def __init__(self, pattern: Any, n_layers: int, path: str) -> None:
        self.pattern, self.n_layers, self.path = pattern, n_layers, path
        self.tokens: list[tuple[str, str]] = []  # a stack of (kind, text): the next one is the last

    def refusal(self, what: str, remedy: str) -> ConfigError:
        rule = f"a pattern names n_layers = {self.n_layers} layers, {what}"
        return ConfigError(self.path, self.pattern, rule, remedy)

    def parse(self) -> list[_Part]:
        """The parts, entry by entry: no group reaches from one entry of a list into the next."""
        entries = [self.pattern] if isinstance(self.pattern, str) else self.pattern
        if not isinstance(entries, Sequence) or not entries or not all(isinstance(entry, str) for entry in entries):
            remedy = "Write 'linear*3 full' or [linear, full]; quote a name that YAML takes for something else, like on"
            raise self.refusal("as text or as a list of texts", remedy)
        longest = 500 + 50 * self.n_layers
        if sum(len(entry) + 1 for entry in entries) > longest:
            self.pattern = f"{self.pattern!s:.60}..."  # an error fits on a screen
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
        """Use up the next token if it is of this kind."""
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
            return _Part(unit, size, self._count(digits))
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
            found = f"{self.tokens[-1][1]!r:.20} stands" if self.tokens else "nothing stands"
            raise self.refusal(f"but {found} where a name is due", "Write name, name*3, name* or (a b)*3 there")
        group = self._sequence(nesting + 1)
        if not self._take("close"):
            raise self.refusal("but a '(' is never closed", "Close its group with ')'")
        return group

    def _count(self, digits: str) -> int:
        # Judged by its length first: Python refuses to convert a number of some thousand digits.
        if len(digits) > 9 or not 1 <= int(digits) <= self.n_layers:
            remedy = f"Repeat 1 to {self.n_layers} times, or end the part in a bare * to fill what is left"
            raise self.refusal(f"but a part is to stand {digits:.20} times", remedy)
        return int(digits)


def _fixed(parts: Iterable[_Part]) -> int:
    return sum(part.size * part.times for part in parts)


def _spell(parts: Iterable[_Part]) -> list[str]:
    spelt: list[str] = []
    for unit, _, times in parts:
        spelt += ([unit] if isinstance(unit, str) else _spell(unit)) * times
    return spelt


def expand(pattern: str | Sequence[str], n_layers: int, path: str) -> list[str]:
    """Spell a pattern out.

    Args:
        pattern: text in the language above, or a list of such texts
        n_layers: the depth, at least 1
        path: where the pattern stands, for the error

    Returns:
        One name a layer, n_layers of them.

    Raises:
        ConfigError: the pattern cannot be read or does not come out at n_layers; no big list has been made by then.
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
    if not fillers:  # to tile is to be one group that fills
        parts = fillers = [_Part(parts, fixed, _FILL)]
        fixed = 0
    size, room = fillers[0].size, n_layers - fixed
    times, odd = divmod(room, size)
    # Only a single name may fill nothing. A period that is cut off, or is not there at all, is another model.
    if odd or (size > 1 and not times):
        fits = [n_layers - odd] * (times > 0) + [n_layers - odd + size]
        remedy = f"Let a single name end in a bare * to fill any room, or set n_layers to {' or '.join(map(str, fits))}"
        raise parser.refusal(f"but {size} at a time cannot fill {room} of them", remedy)
    return _spell(part._replace(times=times) if part.times == _FILL else part for part in parts)


def select(selector: int | str | Sequence[int | str], n_layers: int, path: str) -> list[int]:
    """Find the layers that an override is for.

    Args:
        selector: a layer (-1 is the last), ``"a..b"`` with both ends, or a list of these
        n_layers: the depth, at least 1
        path: where the selector stands, for the error

    Returns:
        Layer indices from 0, ascending, each once.

    Raises:
        ConfigError: it selects nothing, or a layer that is not there.
    """

    def refusal(what: str, remedy: str) -> ConfigError:
        return ConfigError(path, selector, f"n_layers = {n_layers} has layers 0..{n_layers - 1}, {what}", remedy)

    def layer(index: int) -> int:
        if not -n_layers <= index < n_layers:
            remedy = (
                f"Write 0 to {n_layers - 1}, or -1 for the last; a range is a..b, for YAML reads 1:4 as the number 64"
            )
            raise refusal(f"and {index} is none of them", remedy)
        return index % n_layers

    def layers(item: Any) -> Iterable[int]:
        if isinstance(item, int) and not isinstance(item, bool):
            return [layer(item)]
        ends = _RANGE.fullmatch(item) if isinstance(item, str) else None
        if not ends:
            remedy = "Write a layer, 3 or -1, a range with both ends, 0..2, or a list of these"
            if isinstance(item, str) and ":" in item:
                remedy = "Write a..b, with both ends: YAML takes some of a:b for a number (1:4 is 64)"
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


@dataclass(frozen=True)
class _Choices:
    """What a name can mean for one kind in this model."""

    kind: str
    own: Node | None
    variants: dict[str, Node | None]
    registered: frozenset[str]

    def named(self, name: str, path: str, value: Any) -> Node | None:
        """The node that a name means; `value` is what stands at `path`, for the error."""
        if name in self.variants:
            return self.changed(self.own, self.variants[name], f"model.variants.{self.kind}.{name}")
        if self.own and name in (self.kind, self.own["name"]):
            return self.own
        if name in self.registered:
            return {"name": name}
        rule = f"{name!r} is neither in model.variants.{self.kind} nor a registered {self.kind} block"
        known = {*self.variants, *self.registered, *([self.kind] if self.own else [])}
        remedy = did_you_mean(name, known, f"Register a block of kind {self.kind}")
        raise ConfigError(path, value, rule, remedy)

    def changed(self, node: Node | None, change: Any, path: str) -> Node | None:
        """The node after a change: one with a name replaces it, one without patches it, null takes it away."""
        if change is None:
            return None
        if isinstance(change, str):
            return self.named(change, path, change)
        change = _node(change, path)
        if "name" in change:
            return change
        if node is None:
            rule = f"a node without a name patches the {self.kind} that is there, and there is none"
            raise ConfigError(path, change, rule, f"Give it a name, or set model.{self.kind}")
        return patched(node, change)

    def column(self, pattern: Any, n_layers: int) -> list[Node | None]:
        """The node of each layer before any override."""
        if pattern is None:
            return [self.own] * n_layers
        path = f"model.layout.{self.kind}"
        spelt = expand(pattern, n_layers, path)
        meaning = {name: self.named(name, path, pattern) for name in dict.fromkeys(spelt)}
        self._refuse_unused(pattern, path)
        return [meaning[name] for name in spelt]

    def _refuse_unused(self, pattern: Any, path: str) -> None:
        """A pattern that never means the model's own node would make swapping that node a change of nothing."""
        if self.own is None:
            return
        patches = {name for name, node in self.variants.items() if node is not None and "name" not in node}
        words = set(re.findall(_NAME, " ".join(map(str, pattern)) if isinstance(pattern, list) else str(pattern)))
        if not words & {self.kind, self.own["name"], *patches}:
            rule = f"the pattern never uses model.{self.kind} ({self.own['name']}), so choosing it would change nothing"
            remedy = f"Write {self.kind} in the pattern where model.{self.kind} is meant, e.g. dense*1 {self.kind}*"
            raise ConfigError(path, pattern, rule, remedy)


def patched(node: Mapping[str, Any], patch: Mapping[str, Any]) -> Node:
    """The node with the patch merged in.

    A child with a name replaces, as at the top, lest one block's parameters end up in another. A null takes a child
    away; ``inherit`` leaves it to the model again.
    """
    merged = dict(node)
    for key, value in patch.items():
        under = merged.get(key)
        under = {"name": under} if isinstance(under, str) and under != INHERIT else under
        merges = isinstance(value, Mapping) and "name" not in value
        merged[key] = patched(under, value) if merges and isinstance(under, Mapping) else value
    return merged


def _node(value: Any, path: str, must_have_name: bool = False) -> Node:
    node = {"name": value} if isinstance(value, str) else _mapping(value, path, "swiglu or {name: swiglu, d_ff: 512}")
    name = node.get("name")
    if (must_have_name or "name" in node) and not (isinstance(name, str) and name):
        raise ConfigError(
            f"{path}.name", name, "a node's name is the name of a block", "Write it as text: name: swiglu"
        )
    return dict(node)


def _mapping(value: Any, path: str, example: str, keys: Iterable[str] | None = None) -> Mapping[str, Any]:
    """The value, which is a mapping with none but these keys."""
    if not isinstance(value, Mapping):
        raise ConfigError(path, value, f"{path} is a mapping", f"Write {example}")
    for key in value:
        if keys is not None and key not in keys:
            raise ConfigError(f"{path}.{key}", value[key], f"{path} has no key {key!r}", did_you_mean(key, keys))
    return value


def _optional(value: Any, path: str, example: str, keys: Iterable[str] | None = None) -> Mapping[str, Any]:
    return {} if value is None else _mapping(value, path, example, keys)


def _variants(value: Any, path: str) -> dict[str, Node | None]:
    nodes = _optional(value, path, "{wide: {d_ff: 4096}}")
    for name, node in nodes.items():
        if not isinstance(name, str) or not re.fullmatch(_NAME, name):
            rule = "the name of a variant is one that a pattern can hold"
            raise ConfigError(f"{path}.{name}", node, rule, "Use lower-case letters, digits and _: full_2")
    return {name: None if node is None else _node(node, f"{path}.{name}") for name, node in nodes.items()}


def _depth(n_layers: Any) -> int:
    if isinstance(n_layers, bool) or not isinstance(n_layers, int) or not 1 <= n_layers <= MAX_LAYERS:
        rule = f"n_layers is an integer from 1 to {MAX_LAYERS}"
        raise ConfigError("model.n_layers", n_layers, rule, "Write how many layers the decoder has")
    return n_layers


def plan(
    model: Mapping[str, Any], kinds: Sequence[str], names: Callable[[str], Iterable[str]]
) -> list[dict[str, dict[str, Any]]]:
    """Work out the nodes of every layer: the model's own, then the layout, then the overrides.

    Args:
        model: n_layers, a node for each kind (or a bare name, or nothing), and maybe layout, variants and overrides;
            plain Python types, left as they are
        kinds: the kinds of which a layer has one each, as attention and ffn
        names: the registered names of a kind

    Returns:
        For each layer, kind -> node. Each node has a name and is the caller's to change. A kind nobody chose is absent.

    Raises:
        ConfigError: at the exact path of what cannot be right.
    """
    model = _mapping(model, "model", "{n_layers: 2, ffn: swiglu}")
    n_layers = _depth(model.get("n_layers"))
    layout = _optional(model.get("layout"), "model.layout", "{ffn: dense moe*}", kinds)
    variants = _optional(model.get("variants"), "model.variants", "{ffn: {wide: {d_ff: 4096}}}", kinds)
    choices = {}
    for kind in kinds:
        own = None if model.get(kind) is None else _node(model[kind], f"model.{kind}", must_have_name=True)
        named = _variants(variants.get(kind), f"model.variants.{kind}")
        choices[kind] = _Choices(kind, own, named, frozenset(names(kind)))
    columns = {kind: choice.column(layout.get(kind), n_layers) for kind, choice in choices.items()}
    _override(columns, model.get("overrides"), choices, n_layers)
    # Until here layers share nodes, for no step changes one in place. A caller may.
    return [
        {kind: copy.deepcopy(node) for kind, column in columns.items() if (node := column[layer]) is not None}
        for layer in range(n_layers)
    ]


def _override(
    columns: Mapping[str, list[Node | None]], overrides: Any, choices: Mapping[str, _Choices], n_layers: int
) -> None:
    """Apply the overrides to the columns, in order."""
    example = "{layers: 0..1, attention: mla}"
    overrides = [] if overrides is None else overrides
    if not isinstance(overrides, Sequence) or isinstance(overrides, str):
        raise ConfigError("model.overrides", overrides, "model.overrides is a list of mappings", f"Write [{example}]")
    for i, override in enumerate(overrides):
        path = f"model.overrides.{i}"
        changes = dict(_mapping(override, path, example, ["layers", *choices]))
        selector = changes.pop("layers", None)
        if selector is None:
            rule = f"an override says which of the n_layers = {n_layers} layers it is for"
            raise ConfigError(f"{path}.layers", None, rule, "Write layers: -1, layers: 0..1 or layers: [0, -1]")
        for layer in select(selector, n_layers, f"{path}.layers"):
            for kind, change in changes.items():
                columns[kind][layer] = choices[kind].changed(columns[kind][layer], change, f"{path}.{kind}")
