"""The catalogue: families of blocks, the registered blocks of each, and their providers.

``@family`` declares a contract (a base class) and its kind; ``@register`` adds a class to a family under a name, which
Hydra knows as the typed option ``<root>/<kind>=<name>`` (registry/hydra.py): for a part of a model,
``model/<kind>=<name>``; for a kind at the root of a configuration, ``<kind>=<name>``. What exists is known from source
files (registry/index.py); a module is imported when a block of it is looked up.

``register("attention", "mqa", fixes={"n_kv_heads": 1})`` registers a block as another one with parameters fixed. The
class derives from the other one and describes itself in its docstring. It needs no constructor: its constructor is the
inherited one without the fixed parameters, in a configuration and in Python.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import inspect
import re
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import BlockError, ConfigError, did_you_mean
from blockwright.registry.index import Declared, index
from blockwright.registry.schema import INHERIT, Parameter, Schema, conforms, fault, fixed_by, read_schema


@dataclass(frozen=True)
class SameAs:
    """The value of a fixed parameter that equals another parameter: ``{"n_kv_heads": SameAs("n_heads")}``."""

    parameter: str

    def __str__(self) -> str:
        return self.parameter


def fix(cls: type, fixes: Mapping[str, Any]) -> None:
    """Remove fixed parameters from the constructor of a class, which then passes their values.

    Args:
        cls: derives from the class whose constructor takes them
        fixes: parameter, or field of a dataclass that is one → its value, or ``SameAs`` another parameter

    Raises:
        TypeError: no such parameter, a value outside its annotation, or a class that is already registered
    """
    if "Config" in vars(cls):
        raise TypeError(f"{cls.__qualname__} is registered under another name: derive a class, and fix that one's")
    constructor = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(constructor)
    hints = typing.get_type_hints(constructor, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}
    within = {f.name: name for name, group in groups.items() for f in dataclasses.fields(group)}
    for group in groups.values():
        hints |= typing.get_type_hints(group, include_extras=True)
    left = {name: p for name, p in signature.parameters.items() if name not in fixes}
    for name, value in fixes.items():
        if name not in (signature.parameters.keys() | within):
            known = did_you_mean(name, left.keys() - {"self"})
            raise TypeError(f"{cls.__qualname__} has no parameter {name!r} to fix. {known}")
        if isinstance(value, SameAs):
            if value.parameter not in left:
                raise TypeError(f"{cls.__qualname__} fixes {name} to {value}, not one of the remaining parameters")
        elif not conforms(value, hints.get(name, Any)):
            raise TypeError(f"{cls.__qualname__} fixes {name} to {value!r}: it {fault(value, hints[name])}")
    remaining = signature.replace(parameters=list(left.values()))

    @functools.wraps(constructor)
    def construct(*args: Any, **kwargs: Any) -> None:
        given = remaining.bind(*args, **kwargs)
        given.apply_defaults()
        fixed = fixed_values(fixes, given.arguments)
        for name, group in ((name, within[name]) for name in fixes if name in within):
            given.arguments[group] = dataclasses.replace(given.arguments[group], **{name: fixed.pop(name)})
        constructor(**given.arguments, **fixed)

    construct.__signature__ = remaining  # type: ignore[attr-defined]
    construct._fixes = {**fixed_by(constructor), **fixes}  # type: ignore[attr-defined]
    cls.__init__ = construct  # type: ignore[misc]


def fixed_values(fixes: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Fixed parameters → their values, given the other parameters."""
    return {name: given[value.parameter] if isinstance(value, SameAs) else value for name, value in fixes.items()}


ROOT = ""  # the root of a configuration, as the root of a kind
SETTINGS = "*"  # the root of a kind whose every block is a setting at the root of a configuration, under its own name
SHARED_CONTEXT = frozenset({"d_model", "n_layers", "layer_idx"})  # supplied to every block by the composer

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_families: dict[str, Family] = {}
_entries: dict[str, dict[str, Entry]] = {}

C = TypeVar("C", bound=type)


class RegistrationError(TypeError):
    """A class that cannot be registered under this name: a programming error, not the user's."""


class Composable:
    """Base class of every contract: what a block passes to its children.

    Class attributes:
        default_children: parameter → node of the child that the block has where neither its own node nor the model
            names one
    """

    default_children: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        """Values supplied to the child in parameter ``child``, in addition to the parent's context.

        Args:
            child: name of the parent's parameter
            known: the context of the parent, the parent's own parameters, and its children built before this one
        """
        return {}


@dataclass(frozen=True)
class Family:
    """A kind of block.

    Args:
        kind: its name
        contract: the base class of its blocks
        context: parameters supplied to its blocks, not configured
        root: the part of the configuration it belongs to; ``ROOT`` for a kind that is such a part itself, ``SETTINGS``
            for one whose blocks are
        in_layers: whether layers may differ in it
    """

    kind: str
    contract: type[Composable]
    context: frozenset[str]
    root: str
    in_layers: bool = True

    @property
    def group(self) -> str:
        """The Hydra group of its blocks."""
        return self.kind if self.root in (ROOT, SETTINGS) else f"{self.root}/{self.kind}"

    @property
    def path(self) -> str:
        """Configuration path of the chosen block."""
        return self.group.replace("/", ".")


@dataclass(frozen=True)
class Entry:
    """One registered block."""

    kind: str
    name: str
    cls: type[Composable]
    schema: Schema
    provider: str

    @property
    def owner(self) -> str:
        return f"{self.provider} ({self.cls.__module__}.{self.cls.__qualname__})"


def family(
    kind: str, *, context: tuple[str, ...] = (), root: str = "model", in_layers: bool = True
) -> Callable[[C], C]:
    """Declare the decorated class as the contract of ``kind``.

    Args:
        kind: name of the family, unique over all roots
        context: constructor parameters that a parent or the composer supplies, beyond ``SHARED_CONTEXT``
        root: part of the configuration that its blocks belong to. With ``root="task"``, the kind ``reward`` is the
            Hydra group ``task/reward``, and its blocks are not part of a model. ``ROOT``: the group is the kind alone.
            ``SETTINGS``: each of its blocks is a group of its own name
        in_layers: False for a part of the model that stands once, outside its layers: layouts, variants and overrides
            do not know the kind
    """

    def declare(contract: C) -> C:
        if not issubclass(contract, Composable):
            raise RegistrationError(f"the contract of {kind!r} must derive from registry.Composable")
        old = _families.get(kind)
        if old and _identity(old.contract) != _identity(contract):
            raise RegistrationError(f"kind {kind!r} already has the contract {_identity(old.contract)}")
        parts = (kind,) if root in (ROOT, SETTINGS) else (kind, root)
        if bad := next((name for name in parts if not _NAME.fullmatch(name)), None):
            raise RegistrationError(f"{bad!r} cannot name a group: write lower-case letters, digits and _")
        _families[kind] = Family(kind, contract, SHARED_CONTEXT | set(context), root, in_layers)
        _entries.setdefault(kind, {})
        return contract

    return declare


def register(kind: str, name: str, *, fixes: Mapping[str, Any] | None = None) -> Callable[[C], C]:
    """Register the decorated class in the family ``kind`` under ``name``; its ``__init__`` signature is its schema.

    Args:
        kind: a family
        name: what ``<root>/<kind>=`` takes
        fixes: parameters of the inherited constructor that this name fixes → their values, or ``SameAs`` another
            parameter (see the top of this file)

    Raises:
        RegistrationError: unknown kind, a name that is taken or malformed, a class that does not derive from the
            contract, a parameter that cannot be fixed, or a constructor with ``*args`` or ``**kwargs`` (which would
            swallow a misspelt key)
    """

    def put(cls: C) -> C:
        if kind not in kinds(None):
            raise RegistrationError(f"there is no family {kind!r}. {did_you_mean(kind, kinds(None))}")
        if not _NAME.fullmatch(name):
            raise RegistrationError(f"{name!r} cannot name a block: write lower-case letters, digits and _")
        if name == INHERIT:
            raise RegistrationError(f"{name!r} cannot name a block: as a child it means the model's own")
        family = find_family(kind)
        if not issubclass(cls, family.contract):
            contract = _identity(family.contract)
            raise RegistrationError(f"{_identity(cls)} must derive from {contract}, the contract of {kind}")
        provider = index().provider(cls.__module__)
        by_contract = {f.contract: f.kind for f in _families.values()}
        try:
            if fixes:
                fix(cls, fixes)
            schema = read_schema(cls, name, family.context, by_contract)
        except TypeError as error:
            raise RegistrationError(str(error)) from None
        enforced({ROOT: kind, SETTINGS: name}.get(family.root, BlockError))(cls)
        entry = Entry(kind, name, cls, schema, provider)
        _refuse_taken(entry)
        _entries[kind][name] = entry
        return cls

    return put


def _refuse_taken(entry: Entry) -> None:
    """Refuse a name that another class has, or that another distribution declares."""
    old, first = _entries[entry.kind].get(entry.name), index().blocks.get(entry.kind, {}).get(entry.name)
    other = old is not None and _identity(old.cls) != _identity(entry.cls)
    if other or (first is not None and first.provider != entry.provider):
        owner = old.owner if old else f"{first.provider} ({first.module})" if first else ""
        rule = f"{entry.kind} {entry.name!r} is already registered by {owner}"
        raise RegistrationError(f"{rule}; {entry.owner} must pick another name")


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def load() -> None:
    """Import everything that is declared, for a command that shows or checks all of it.

    A plug-in that cannot be imported only causes a warning, and its blocks leave the catalogue.
    """
    for kind in kinds(None):
        find_family(kind)
        for name in names(kind):
            try:
                lookup(kind, name)
            except ConfigError as error:
                warnings.warn(f"{kind}/{name} {error.rule}", stacklevel=2)
                del index().blocks[kind][name]


def kinds(root: str | None = "model") -> list[str]:
    """The kinds of a part of the configuration, or with None all of them, in alphabetical order."""
    declared = {kind for kind, found in index().kinds.items() if root in (None, found.root)}
    return sorted(declared | {kind for kind, family in _families.items() if root in (None, family.root)})


def layer_kinds() -> list[str]:
    """The kinds of a model in which its layers may differ, in alphabetical order."""
    return [kind for kind in kinds() if _kind(kind).in_layers]


def groups() -> list[str]:
    """The Hydra groups whose options are registered blocks, in alphabetical order."""
    roots = {kind: _kind(kind).root for kind in kinds(None)}
    return sorted(f"{root}/{kind}" if root else kind for kind, root in roots.items() if root != SETTINGS)


def settings() -> list[str]:
    """The names of the blocks that are settings at the root of a configuration, in alphabetical order."""
    return sorted(name for kind in kinds(SETTINGS) for name in names(kind))


def _kind(kind: str) -> Family | Declared:
    return _families.get(kind) or index().kinds[kind]


def find_family(kind: str) -> Family:
    """The family of a kind.

    Raises:
        KeyError: no such kind
    """
    if kind not in _families:
        importlib.import_module(index().kinds[kind].module)
    return _families[kind]


def families() -> list[Family]:
    """All families, in alphabetical order of their groups."""
    return sorted((find_family(kind) for kind in kinds(None)), key=lambda family: family.group)


def names(kind: str, pattern: str = "*") -> list[str]:
    """Names registered in ``kind`` that match a shell wildcard, in alphabetical order; none for an unknown kind."""
    known = {*index().blocks.get(kind, {}), *_entries.get(kind, {})}
    return sorted(known if pattern == "*" else (name for name in known if fnmatch.fnmatchcase(name, pattern)))


def default(parameter: Parameter) -> str:
    """What a parameter has where it is not written, for people: its value, or the place a child comes from."""
    if not parameter.child:
        return "required" if parameter.required else parameter.written
    root, name = find_family(parameter.child).root, parameter.name
    if not parameter.optional:
        return f"{root}.{parameter.child}"
    return f"{root}.{name}, if any" if name in kinds(root) else "null"  # null removes an optional one


def provider(kind: str, name: str) -> str:
    """The distribution that a registered block belongs to.

    Raises:
        KeyError: no such kind, or no such name in it
    """
    entry = _entries.get(kind, {}).get(name)
    return entry.provider if entry else index().blocks[kind][name].provider


def lookup(kind: str, name: str) -> Entry:
    """The entry of a registered block, whose module is imported if it is not.

    Raises:
        KeyError: no such kind, or no such name in it
        ConfigError: a plug-in that cannot be imported
    """
    if name not in _entries.get(kind, {}):
        _import(kind, name, index().blocks[kind][name])
    return _entries[kind][name]


def _import(kind: str, name: str, declared: Declared) -> None:
    try:
        importlib.import_module(declared.module)
    except Exception as error:  # another package's import may fail in any way
        if declared.provider == index().provider(__name__):
            raise
        reason = f"{type(error).__name__}: {error}"
        rule = f"is a block of {declared.provider}, which cannot be imported ({reason})"
        raise ConfigError(find_family(kind).path, name, rule, f"Repair {declared.provider}, or uninstall it") from error
