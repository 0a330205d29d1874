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
from typing import Any

from registry.errors import ConfigError, did_you_mean
from registry.pattern import NAME, expand, select
from registry.schema import INHERIT

Node = dict[str, Any]

MAX_LAYERS = 10_000


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
        if name == self.kind:
            rule, remedy = f"means model.{name} by {name!r}, and the model has none", f"Choose one: model/{name}=NAME"
            raise ConfigError(path, value, rule, remedy)
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
        words = set(re.findall(NAME, " ".join(map(str, pattern)) if isinstance(pattern, list) else str(pattern)))
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
        if not isinstance(name, str) or not re.fullmatch(NAME, name):
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
