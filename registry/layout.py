"""Layout: which layer gets which block, in one line of YAML per kind.

    layout:
      attention: linear*3 full       # no bare star: repeats over the depth, which it must divide  L L L F L L L F
      ffn: dense moe*                # one bare star fills the rest, even if empty                 D M M M M M M M
      norm: rms (layer rms*2)* rms   # a group repeats or fills; it must fit a whole number of times  R L R R L R R R
      residual: [pre*4, post*4]      # a list is the same language, one part per entry; so are n_layers names
    variants: {ffn: {dense: {name: swiglu, d_ff: 512}, wide: {d_ff: 4096}}}   # with a name: a node; without: a patch
    overrides:                       # applied afterwards, in order
      - {layers: 0..1, attention: mla}              # a name, or a node with one, replaces
      - {layers: [2, -1], attention: {window: 64}}  # a node without a name patches the layer's node
      - {layers: 3, qk_norm: null}                  # null: none; likewise in a variant

A name means the variant of that name, else the model's own node if it has that name, else the registered block; the
kind itself (`dense*1 ffn*`) means the model's own node whatever its name, so that swapping it on the command line
reaches every layer. A pattern that does not use a chosen own node is refused: swapping it would change nothing.
`3*full` is `full*3`, commas are spaces. A range `0..1` includes both ends: YAML 1.1 reads 1:4 as 64.
Not supported: parameters inside a pattern (use a variant), two fillers (their border would be ambiguous), a filler
inside a group, an incomplete period. The meaning of a node's keys is left to the builder.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockwright.registry.errors import ConfigError, did_you_mean
from blockwright.registry.pattern import NAME, expand, select
from blockwright.registry.schema import INHERIT

Node = dict[str, Any]

MAX_LAYERS = 10_000


@dataclass(frozen=True)
class _Choices:
    """The meaning of names for one kind in this model."""

    kind: str
    own: Node | None
    variants: dict[str, Node | None]
    registered: frozenset[str]

    def named(self, name: str, path: str, value: Any) -> Node | None:
        """The node that a name means; `value` is the value at `path`, for the error."""
        if name in self.variants:
            return self.changed(self.own, self.variants[name], f"model.variants.{self.kind}.{name}")
        if self.own and name in (self.kind, self.own["name"]):
            return self.own
        if name in self.registered:
            return {"name": name}
        if name == self.kind:
            rule, remedy = f"means model.{name} by {name!r}, and the model has none", f"Choose one: model/{name}=NAME"
            raise ConfigError(path, value, rule, remedy)
        rule = f"{name!r} is neither in model.variants.{self.kind} nor a registered {self.kind} block"
        known = {*self.variants, *self.registered, *([self.kind] if self.own else [])}
        remedy = did_you_mean(name, known, f"Register a block of kind {self.kind}")
        raise ConfigError(path, value, rule, remedy)

    def changed(self, node: Node | None, change: Any, path: str) -> Node | None:
        """The node after a change: one with a name replaces it, one without patches it, null removes it."""
        if change is None:
            return None
        if isinstance(change, str):
            return self.named(change, path, change)
        change = _node(change, path)
        if "name" in change:
            return change
        if node is None:
            rule = f"a node without a name patches the existing {self.kind}, but there is none"
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
        """Refuse a pattern that never uses the model's own node, since swapping that node would change nothing."""
        if self.own is None:
            return
        patches = {name for name, node in self.variants.items() if node is not None and "name" not in node}
        words = set(re.findall(NAME, " ".join(map(str, pattern)) if isinstance(pattern, list) else str(pattern)))
        if not words & {self.kind, self.own["name"], *patches}:
            rule = f"the pattern never uses model.{self.kind} ({self.own['name']}), so choosing it would change nothing"
            remedy = f"Write {self.kind} in the pattern where model.{self.kind} is meant, e.g. dense*1 {self.kind}*"
            raise ConfigError(path, pattern, rule, remedy)


def patched(node: Mapping[str, Any], patch: Mapping[str, Any]) -> Node:
    """The node with the patch merged in.

    A child with a name replaces, as at the top, so that parameters of two blocks do not mix. A null removes a child;
    ``inherit`` leaves it to the model again.
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
    """The value, checked to be a mapping with no keys but these."""
    if not isinstance(value, Mapping):
        raise ConfigError(path, value, f"{path} must be a mapping", f"Write {example}")
    for key in value:
        if keys is not None and key not in keys:
            raise ConfigError(f"{path}.{key}", value[key], f"{path} has no key {key!r}", did_you_mean(key, keys))
    return value


def _optional(value: Any, path: str, example: str, keys: Iterable[str] | None = None) -> Mapping[str, Any]:
    return {} if value is None else _mapping(value, path, example, keys)


def _variants(value: Any, path: str) -> dict[str, Node | None]:
    nodes = _optional(value, path, "{wide: {d_ff: 4096}}")
    for name, node in nodes.items():
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
            rule = "the name of a variant must be usable in a pattern"
            raise ConfigError(f"{path}.{name}", node, rule, "Use lower-case letters, digits and _: full_2")
    return {name: None if node is None else _node(node, f"{path}.{name}") for name, node in nodes.items()}


def _depth(n_layers: Any) -> int:
    if isinstance(n_layers, bool) or not isinstance(n_layers, int) or not 1 <= n_layers <= MAX_LAYERS:
        rule = f"n_layers must be an integer from 1 to {MAX_LAYERS}"
        raise ConfigError("model.n_layers", n_layers, rule, "Write how many layers the decoder has")
    return n_layers


def plan(
    model: Mapping[str, Any], kinds: Sequence[str], names: Callable[[str], Iterable[str]]
) -> list[dict[str, dict[str, Any]]]:
    """Compute the nodes of every layer: the model's own, then the layout, then the overrides.

    Args:
        model: n_layers, a node for each kind (or a bare name, or nothing), and optionally layout, variants and
            overrides; plain Python types, not modified
        kinds: the kinds of which each layer has one, such as attention and ffn
        names: the registered names of a kind

    Returns:
        For each layer, kind -> node. Each node has a name and may be modified. Kinds without a node are absent.

    Raises:
        ConfigError: at the exact path of the invalid value.
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
    # Until here layers share nodes, since no step modifies one in place. A caller may.
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
        raise ConfigError("model.overrides", overrides, "must be a list of mappings", f"Write [{example}]")
    for i, override in enumerate(overrides):
        path = f"model.overrides.{i}"
        changes = dict(_mapping(override, path, example, ["layers", *choices]))
        selector = changes.pop("layers", None)
        if selector is None:
            rule = f"an override must select some of the n_layers = {n_layers} layers"
            raise ConfigError(f"{path}.layers", None, rule, "Write layers: -1, layers: 0..1 or layers: [0, -1]")
        for layer in select(selector, n_layers, f"{path}.layers"):
            for kind, change in changes.items():
                columns[kind][layer] = choices[kind].changed(columns[kind][layer], change, f"{path}.{kind}")
