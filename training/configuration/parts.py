"""The parts of a run that are registered kinds: its task, its data module, and the starts of its weights.

They are built as blocks are, and a run's configuration is its user's own, so it may name files. What a family declares
as context comes from the root of the configuration; a parameter whose class is no kind (a corpus, an optimizer) takes a
node with ``_target_``.
"""

from __future__ import annotations

import typing
from abc import ABC
from collections.abc import Mapping
from typing import Any

from blockwright import registry
from blockwright.registry import INHERIT, ConfigError, Node, Scope
from blockwright.training.configuration.instantiate import build_part, instantiate
from blockwright.training.configuration.run import STANDARD

COPIED = "init_from"  # the start that copies all weights
EXAMPLES = {
    "data.corpus": "For example: data=shakespeare, or data=text data.corpus.files='books/*.txt'",
    "data.tokenizer": "For example: data/tokenizer=bytes (or chars, or bpe)",
    "data.sources": "For example: 'data.sources={web: {files: web/*.bin}, plays: {corpus: {_target_: CLASS}}}'",
    "data.transforms": "For example: +data.transforms.NAME._target_=MODULE.CLASS",
}


def class_of(kind: str, plain: Mapping[str, Any]) -> Any:
    """The class of the task or the data module that a configuration chooses.

    Raises:
        ConfigError: there is none of its name
    """
    return registry.resolve(kind, Node(_named(kind, plain[kind]), kind))[0].cls


def check(kind: str, plain: Mapping[str, Any]) -> None:
    """Refuse unknown, missing and invalid settings of a part and of its children, without building it.

    Args:
        kind: ``task`` or ``data``
        plain: a configuration

    Raises:
        ConfigError: at the setting
    """
    node = Node(_named(kind, plain[kind]), kind)
    for _ in registry.walk(kind, node, _scope(kind, node)):
        pass


def build(kind: str, plain: Mapping[str, Any]) -> Any:
    """Build the task or the data module of a configuration.

    Args:
        kind: ``task`` or ``data``
        plain: a configuration; parts of it may be built already

    Raises:
        ConfigError: at the setting
    """
    written = _named(kind, plain[kind])
    entry, _ = registry.resolve(kind, Node(written, kind))
    hints = {name: p.hint for name, p in entry.schema.parameters.items() if not p.child}
    made = {k: _made(v, hints[k], f"{kind}.{k}") if k in hints else v for k, v in dict(written).items()}
    known = plain
    if kind == "task":
        known = {"starts": starts(plain), **plain, "parametrisation": parametrisation(plain)}
    context = {key: known[key] for key in registry.find_family(kind).context if key in known}
    context = {key: instantiate(value, key) if _is_target(value) else value for key, value in context.items()}
    node = Node(made, kind)
    return registry.build(kind, node, Scope(_scope(kind, node), context, own=True))


def parametrisation(plain: Mapping[str, Any]) -> Any:
    """The parametrisation that a configuration chooses.

    Args:
        plain: a configuration, its model complete

    Raises:
        ConfigError: at its setting
    """
    return build("parametrisation", {"parametrisation": STANDARD, **plain})


def starts(plain: Mapping[str, Any]) -> list[Any]:
    """The starts that a configuration chooses, in the order in which they fill a decoder.

    The weights of ``init_from`` are copied first, or one start derives all weights from them.

    Args:
        plain: a configuration, its model complete

    Raises:
        ConfigError: at a setting of a start; several derive all weights
    """
    chosen = [name for name in registry.names("start") if name != COPIED and plain.get(name) is not None]
    built = [_start(name, plain) for name in chosen]
    deriving = [start for start in built if start.derives]
    if len(deriving) > 1:
        several = [name for name, start in zip(chosen, built, strict=True) if start.derives]
        rule = f"derives all weights, and so does {several[0]}"
        raise ConfigError(several[1], plain[several[1]], rule, f"Leave one out: ~{several[1]}")
    copied = [_start(COPIED, plain)] if plain.get(COPIED) is not None and not deriving else []
    return [*copied, *deriving, *(start for start in built if not start.derives)]


def _start(name: str, plain: Mapping[str, Any]) -> Any:
    settings = plain[name] if isinstance(plain[name], Mapping) else {}
    if "name" in settings:
        rule = f"{name} is a setting of its own, not a choice among several"
        raise ConfigError(f"{name}.name", settings["name"], rule, f"Leave out {name}.name")
    context = {key: plain[key] for key in registry.find_family("start").context if key in plain}
    return registry.build("start", Node({"name": name, **settings}, name), Scope({}, context, own=True))


def _named(kind: str, node: Any) -> Any:
    """A node as a mapping, refused if it names a class."""
    if isinstance(node, str):
        return {"name": node}
    if isinstance(node, Mapping) and "_target_" in node:
        raise no_class(kind, node["_target_"])
    return node


def no_class(kind: str, target: Any) -> ConfigError:
    """The error for a class in place of the name of a part."""
    rule = f"a {kind} is chosen by the name that it is registered under, not by its class"
    remedy = f"Register the class, @register({kind!r}, NAME), and write {kind}=NAME (docs/how-to/add-a-task.md)"
    return ConfigError(f"{kind}._target_", target, rule, remedy)


def _scope(kind: str, node: Node) -> dict[str, Node]:
    """The children in the node of a part: children of these take them too, unless they name their own."""
    entry, given = registry.resolve(kind, node)
    written = {**entry.cls.default_children, **{k: v for k, v in given.items() if v not in (None, INHERIT)}}
    return {name: Node(written[name], f"{kind}.{name}") for name in entry.schema.children if name in written}


def _made(value: Any, hint: Any, path: str) -> Any:
    """The value of a parameter; where its class is abstract, the object that a node with ``_target_`` names."""
    contract, by_name = _contract(hint)
    if contract is None or isinstance(value, contract) or (value is None and type(None) in typing.get_args(hint)):
        return value
    example = EXAMPLES.get(path, f"Write {path}._target_=MODULE.CLASS")
    if not by_name:
        return build_part(value, contract, path, example)
    if not isinstance(value, Mapping):
        raise ConfigError(path, value, f"maps names to nodes of a {contract.__name__}", example)
    chosen = {name: each for name, each in value.items() if each is not None}
    return {
        name: each
        if isinstance(each, contract)
        else build_part(_targeted(each, contract), contract, f"{path}.{name}", example)
        for name, each in chosen.items()
    }


def _targeted(node: Any, contract: type) -> Any:
    """A node that names no class, with the one that its contract chooses for such a node, if it chooses."""
    choose = getattr(contract, "target", None)
    names_none = isinstance(node, Mapping) and "_target_" not in node
    return {"_target_": choose(node), **node} if choose is not None and names_none else node


def _contract(hint: Any) -> tuple[type | None, bool]:
    """The abstract class of the objects that an annotation takes, and whether it maps names to them."""
    for part in (hint, *typing.get_args(hint)):
        by_name = typing.get_origin(part) is Mapping
        inner = typing.get_args(part)[1] if by_name else part
        if isinstance(inner, type) and issubclass(inner, ABC):
            return inner, by_name
    return None, False


def _is_target(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value
