"""Build a block from a configuration node: strict keys and types, children found by scope, errors with their path.

Only registered names build anything. A node may be untrusted: ``_target_`` and its relatives are refused anywhere in
it, nothing is imported, no string is evaluated, and it names no file (``Scope.own``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.registry import catalogue
from blockwright.registry.catalogue import fixed_values
from blockwright.registry.errors import BlockError, ConfigError, did_you_mean
from blockwright.registry.layout import patched
from blockwright.registry.limits import check_text, check_values, load_text
from blockwright.registry.recording import Built, note
from blockwright.registry.schema import INHERIT, Parameter

# --- resolve the nodes of a block's children: the block's own, the model's, or none -----------------------------------


@dataclass(frozen=True)
class Node:
    """A node of the configuration and its path."""

    value: Any
    path: str


def child_nodes(
    kind: str, name: str, p: Parameter, own: Node, scope: Mapping[str, Node], default: Any = None
) -> list[Node]:
    """The nodes of a parameter's children: one, several for a list, empty for none.

    A child is looked up outward: in the block's own node; then in the scope by the parameter's name; then, unless the
    parameter may be None, in the scope by the child's kind; last, it is the block's default. The default comes before
    the scope where the child is of the block's own kind: the one in the scope is then the block itself.

    Args:
        kind, name: of the block
        p: a parameter that takes a child
        own: its value in the block's node; ``inherit`` if absent
        scope: parameter name or kind → the node in effect
        default: node of the child where none is named; None for none

    Raises:
        ConfigError: null for a required child
    """
    if own.value is None:
        if not p.optional:
            remedy = f"Leave it out for the model's own {p.child}, or name a registered one"
            raise ConfigError(own.path, "null", f"{kind} {name!r} requires a block of kind {p.child}", remedy)
        return []
    if p.many and isinstance(own.value, list):
        return [Node(item, f"{own.path}.{i}") for i, item in enumerate(own.value)]
    around = scope.get(p.name) or (None if p.optional else scope.get(p.child or ""))
    if default is not None and (around is None or around.value is None or kind == p.child):
        around = Node(default, own.path)
    if around is None or around.value is None:
        return [] if own.value == INHERIT else [own]
    if own.value == INHERIT:
        return [around]
    if isinstance(own.value, Mapping) and "name" not in own.value:
        outer = {"name": around.value} if isinstance(around.value, str) else around.value
        return [Node(patched(outer, own.value), own.path)]
    return [own]


@dataclass(frozen=True)
class Scope:
    """Where a block's children are looked up outside its own node.

    Args:
        nodes: parameter name or kind → the node in effect
        context: values of the composer (``d_model``, ``layer_idx``, …)
        parents: kinds and names of the blocks being built, outermost first
        own: whether the nodes were written by the one who runs the program, on a command line or in a file that must be
            their own (docs/security.md): these alone may name files. Those of a checkpoint, of a run's folder and of
            any other file that was read may not
    """

    nodes: Mapping[str, Node]
    context: Mapping[str, Any]
    parents: tuple[tuple[str, str], ...] = field(default=())
    own: bool = False


def to_plain(config: Any, path: str = "model") -> Any:
    """YAML text, an OmegaConf node or a mapping → dicts, lists and scalars, within the limits of registry/limits.py.

    An OmegaConf node comes from this project, and its interpolations are resolved. Text and mappings may be untrusted:
    interpolations in them are refused.

    Raises:
        ConfigError: unreadable or oversized YAML, interpolations in data, or an interpolation that cannot be resolved
    """
    own = isinstance(config, DictConfig | ListConfig)
    try:
        if isinstance(config, str):
            check_text(config, path)
            check_values(load_text(config), path)
            config = OmegaConf.create(config)
        elif isinstance(config, Mapping) and not own:
            check_values(config, path)
            if _is_plain(config):
                return _copied(config)
            config = OmegaConf.create(dict(config))
        if isinstance(config, DictConfig | ListConfig):
            config = OmegaConf.to_container(config, resolve=own, enum_to_str=True)
            check_values(config, path, data=not own)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        where = path if not key else key if own else f"{path}.{key}"
        raise ConfigError(where, "…", str(error).splitlines()[0], "Fix the value or the interpolation") from None
    except ConfigError:
        raise
    except Exception as error:  # YAML's own errors, of several unrelated classes
        mark = getattr(error, "problem_mark", None)
        reason = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else " ".join(str(error).split())
        raise ConfigError(path, "…", f"cannot be read as YAML ({reason})", "Fix the text") from None
    return config


def _is_plain(value: Any) -> bool:
    """Whether OmegaConf would return a copy of it, for which it takes ten times as long."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(inner) for key, inner in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _copied(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if type(value) is list else value


def refuse_targets(value: Any, path: str) -> None:
    """Refuse ``_target_``, ``_partial_``, ``_args_`` … anywhere: in a model, only registered names build anything."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if str(key).startswith("_"):
                rule = "a model configuration builds registered blocks only, never a class by its dotted path"
                raise ConfigError(f"{path}.{key}", inner, rule, "Write `name: <registered block>` (blockwright blocks)")
            refuse_targets(inner, f"{path}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            refuse_targets(inner, f"{path}.{i}")


def resolve(kind: str, node: Node) -> tuple[catalogue.Entry, dict[str, Any]]:
    """Validate a node against the schema of the block it names.

    Args:
        kind: the family the block must be of
        node: a name, or a mapping with ``name`` and parameters

    Returns:
        the registered entry, and its parameters: given ones and defaults; children unresolved, ``inherit`` if not
        given

    Raises:
        ConfigError: unknown name or parameter, wrong type, missing value
    """
    written = {"name": node.value} if isinstance(node.value, str) else node.value
    if not isinstance(written, Mapping) or "name" not in written:
        rule, options = f"must name a registered {kind}", ", ".join(catalogue.names(kind))
        raise ConfigError(
            node.path, node.value, rule, f"Select one of: {options}, e.g. {catalogue.find_family(kind).group}=<name>"
        )
    name: Any = written["name"]
    if name not in catalogue.names(kind):
        rule, remedy = f"no {kind} is registered under this name", did_you_mean(name, catalogue.names(kind))
        raise ConfigError(f"{node.path}.name", name, rule, remedy)
    entry = catalogue.lookup(kind, name)
    known = entry.schema.parameters
    for key in written:
        if key != "name" and key not in known:
            if key in entry.schema.fixed:
                raise fixed(entry, key, written[key], node.path)
            hint = " (it is supplied by the composer)" if key in entry.schema.context else ""
            rule = f"{kind} {name!r} has no parameter {key!r}{hint}"
            remedy = did_you_mean(key, known, "It takes no parameters") + _alike(node.path)
            raise ConfigError(f"{node.path}.{key}", written[key], rule, remedy)
    return entry, {p.name: _value(entry, p, written, node.path) for p in known.values()}


def fixed(entry: catalogue.Entry, key: str, value: Any, path: str) -> ConfigError:
    """The error for a value of a parameter that is fixed in a registration."""
    held = entry.schema.fixed[key].default
    free = [n for n in catalogue.names(entry.kind) if key in catalogue.lookup(entry.kind, n).schema.parameters]
    rule = f"{entry.kind} {entry.name!r} fixes {key} to {'null' if held is None else held}"
    remedy = f"Leave it out, or choose a block that takes it: {', '.join(free)}" if free else "Leave it out"
    return ConfigError(f"{path}.{key}", value, rule, remedy + _alike(path))


def _alike(path: str) -> str:
    """How to leave out a variant: its patch stays when the block that it patches is exchanged."""
    root, variants, variant = path.partition(".variants.")
    kind = variant.partition(".")[0]
    return f". For one {kind} in all layers: {root}.layout.{kind}=null {root}.variants.{kind}=null" if variants else ""


def _value(entry: catalogue.Entry, p: Parameter, written: Mapping[str, Any], path: str) -> Any:
    if p.child:
        return written.get(p.name, INHERIT)
    value = written.get(p.name, p.default)
    if value is p.default and not p.required:
        return value
    if p.required and (p.name not in written or value == "???"):
        needed = f"{entry.kind} {entry.name!r} requires it: {p.description or p.type}"
        raise ConfigError(f"{path}.{p.name}", "???", needed, f"Give a value: {path}.{p.name}=<{p.type}>")
    rule = p.fault(value)
    if rule:
        remedy = f"{entry.kind} {entry.name!r} declares {p.name}: {p.type}"
        raise ConfigError(f"{path}.{p.name}", value, rule, remedy)
    return value


def as_written(kind: str, node: Any) -> Any:
    """A node without children that are ``inherit``, recursively."""
    if not isinstance(node, Mapping) or node.get("name") not in catalogue.names(kind):
        return node
    children = catalogue.lookup(kind, node["name"]).schema.children

    def child(key: str, value: Any) -> Any:
        if key not in children:
            return value
        inner: Any = children[key].child
        return [as_written(inner, v) for v in value] if isinstance(value, list) else as_written(inner, value)

    return {k: child(k, v) for k, v in node.items() if not (k in children and v == INHERIT)}


def walk(
    kind: str, node: Node, scope: Mapping[str, Node], parents: tuple[tuple[str, str], ...] = ()
) -> Iterator[tuple[Node, catalogue.Entry, dict[str, Any]]]:
    """Every block that ``build`` would make of a node, itself first: its path, its entry, its parameters.

    Raises:
        ConfigError: as ``resolve``
    """
    entry, given = resolve(kind, node)
    yield node, entry, given
    parents = (*parents, (kind, entry.name))
    for p in entry.schema.children.values():
        own = Node(given[p.name], f"{node.path}.{p.name}")
        for inner in child_nodes(kind, entry.name, p, own, scope, entry.cls.default_children.get(p.name)):
            name = inner.value.get("name") if isinstance(inner.value, Mapping) else inner.value
            if p.child and (p.child, name) not in parents:  # build refuses such a node
                yield from walk(p.child, inner, scope, parents)


def build(kind: str, node: Node, scope: Scope) -> Any:
    """Build a block and, before it, the children that its constructor takes.

    Where a child is looked up: ``blockwright.registry.build``.

    Raises:
        ConfigError: any error in the node or a child's, with the path where it is written; a file that a node names
            which is not the user's own
    """
    entry, given = resolve(kind, node)
    for p in entry.schema.parameters.values():
        if p.place and not scope.own and given[p.name] not in (None, p.default):
            rule = (
                f"is a path, and a model, a checkpoint or a folder that is read names no file ({kind} {entry.name!r})"
            )
            remedy = "Choose another, or write this node yourself: on the command line, or in a file of your own"
            raise ConfigError(f"{node.path}.{p.name}", given[p.name], rule, remedy)
    if (kind, entry.name) in scope.parents:
        chain = " → ".join(f"{k} {n}" for k, n in (*scope.parents, (kind, entry.name)))
        remedy = f"Name another {kind} as the inner one"
        raise ConfigError(node.path, entry.name, f"would contain itself ({chain})", remedy)
    known = {**scope.context, **{k: v for k, v in given.items() if k not in entry.schema.children}}
    known |= fixed_values({name: p.default for name, p in entry.schema.fixed.items()}, known)
    try:
        built: dict[str, Any] = {}
        for p in entry.schema.children.values():
            own = Node(given[p.name], f"{node.path}.{p.name}")
            built[p.name] = _build_child(entry, p, own, known, built, scope)
        supplied = {k: scope.context[k] for k in entry.schema.context if k in scope.context}
        block = entry.cls(**entry.schema.arguments({**given, **built, **supplied}))
    except BlockError as error:
        if error.parameter in scope.context and error.parameter not in entry.schema.parameters:  # the parent's value
            rule = f"{error.rule} ({error.parameter} = {error.value})"
            raise ConfigError(node.path, entry.name, rule, error.remedy) from None
        raise ConfigError(f"{node.path}.{error.parameter}", error.value, error.rule, error.remedy) from None
    except ConfigError:
        raise
    except Exception as error:  # a plug-in's constructor: report its message with a path, not a traceback
        lacking = [k for k in sorted(entry.schema.context - scope.context.keys()) if f"'{k}'" in str(error)]
        if lacking and scope.parents:
            owner, names = "{} {!r}".format(*scope.parents[-1]), ", ".join(lacking)
            rule = f"{kind} {entry.name!r} needs {names} of the block that owns it, and {owner} does not give it"
            remedy = f"Return it from child_context for this child: {{{lacking[0]!r}: …}}"
            raise ConfigError(node.path, entry.name, rule, remedy) from error
        if "overflow" in str(error):  # torch's word for sizes beyond the address space
            rule = f"{kind} {entry.name!r} has a tensor of more numbers than any can hold"
            raise ConfigError(node.path, entry.name, rule, "Lower its widths, or those of the model") from error
        rule = f"{kind} {entry.name!r} of {entry.provider} cannot be built: {type(error).__name__}: {error}"
        set_values = {k: v for k, v in given.items() if v is not None}
        raise ConfigError(node.path, set_values, rule, "Check its parameters") from error
    settings = {name: value for name, value in given.items() if name not in built}
    note(Built(entry, node.path, block, settings, built))
    return block


def add_one(group: str, kind: str) -> str:
    """The remedy where a block is missing."""
    return f"Add one: +{group}=<{'|'.join(catalogue.names(kind))}>; without the + where a preset has one"


def _build_child(
    parent: catalogue.Entry,
    p: Parameter,
    own: Node,
    known: Mapping[str, Any],
    built: Mapping[str, Any],
    scope: Scope,
) -> Any | None:
    """The child for a parameter, a list of them, or None."""
    assert p.child is not None
    default = parent.cls.default_children.get(p.name)
    nodes = child_nodes(parent.kind, parent.name, p, own, scope.nodes, default)
    if not nodes and not p.optional and own.value == INHERIT:
        rule = f"{parent.kind} {parent.name!r} requires a block of kind {p.child!r}, and none is selected"
        family = catalogue.find_family(p.child)
        if parent.kind == p.child:  # there the node is the parent itself
            raise ConfigError(own.path, None, rule, f"Name one: {own.path}=<{'|'.join(catalogue.names(p.child))}>")
        raise ConfigError(family.path, None, rule, add_one(family.group, p.child))
    if not nodes and own.value != []:
        return None
    context = {**known, **parent.cls.child_context(p.name, {**known, **built})}
    inner = replace(scope, context=context, parents=(*scope.parents, (parent.kind, parent.name)))
    children = [build(p.child, node, inner) for node in nodes]
    return children if p.many else children[0]
