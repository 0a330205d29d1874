"""The catalogue: families of blocks, the registered blocks of each, and their providers.

``@family`` declares a contract (a base class) and its kind; ``@register`` adds a class to a family under a name, which
Hydra knows as the typed option ``<root>/<kind>=<name>`` (registry/hydra.py): for a part of a model,
``model/<kind>=<name>``; for a kind at the root of a configuration, ``<kind>=<name>``. Built-ins are imported from the
packages of ``BUILTIN``; plug-ins come from installed distributions through the entry-point group
``blockwright.blocks``. Only installed code registers names: nothing is
registered from a path or string in a configuration.
"""

from __future__ import annotations

import contextlib
import contextvars
import fnmatch
import functools
import importlib
import importlib.util
import pkgutil
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from blockwright.registry.enforcing import enforced
from blockwright.registry.errors import BlockError, did_you_mean
from blockwright.registry.fixes import fix
from blockwright.registry.schema import INHERIT, Schema, read_schema

ENTRY_POINTS = "blockwright.blocks"
# Package that holds built-in families → the distribution that owns it.
_PARTS = ("blocks", "training.objectives", "training.data", "training.rollouts", "training.tasks")
BUILTIN = dict.fromkeys(tuple(f"blockwright.{part}" for part in _PARTS), "blockwright")
# Kinds that import Lightning → their packages, imported when one of them is looked up.
LATE = {"data": "blockwright.training.data.modules", "task": "blockwright.training.tasks"}
ROOT = ""  # the root of a configuration, as the root of a kind
SHARED_CONTEXT = frozenset({"d_model", "n_layers", "layer_idx"})  # supplied to every block by the composer

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_families: dict[str, Family] = {}
_entries: dict[str, dict[str, Entry]] = {}
_provider: contextvars.ContextVar[str | None] = contextvars.ContextVar("provider", default=None)

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
        root: the part of the configuration it belongs to; ``ROOT`` for a kind that is such a part itself
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
        return f"{self.root}/{self.kind}" if self.root else self.kind

    @property
    def path(self) -> str:
        """Configuration path of the chosen block."""
        return f"{self.root}.{self.kind}" if self.root else self.kind


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
            Hydra group ``task/reward``, and its blocks are not part of a model. ``ROOT``: the group is the kind alone
        in_layers: False for a part of the model that stands once, outside its layers: layouts, variants and overrides
            do not know the kind
    """

    def declare(contract: C) -> C:
        if not issubclass(contract, Composable):
            raise RegistrationError(f"the contract of {kind!r} must derive from registry.Composable")
        old = _families.get(kind)
        if old and _identity(old.contract) != _identity(contract):
            raise RegistrationError(f"kind {kind!r} already has the contract {_identity(old.contract)}")
        if bad := next((name for name in (kind, root or kind) if not _NAME.fullmatch(name)), None):
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
            parameter (registry/fixes.py)

    Raises:
        RegistrationError: unknown kind, a name that is taken or malformed, a class that does not derive from the
            contract, a parameter that cannot be fixed, or a constructor with ``*args`` or ``**kwargs`` (which would
            swallow a misspelt key)
    """

    def put(cls: C) -> C:
        if kind not in _families:
            raise RegistrationError(f"there is no family {kind!r}. {did_you_mean(kind, _families)}")
        if not _NAME.fullmatch(name):
            raise RegistrationError(f"{name!r} cannot name a block: write lower-case letters, digits and _")
        if name == INHERIT:
            raise RegistrationError(f"{name!r} cannot name a block: as a child it means the model's own")
        contract = _families[kind].contract
        if not issubclass(cls, contract):
            raise RegistrationError(f"{_identity(cls)} must derive from {_identity(contract)}, the contract of {kind}")
        provider = _provider.get() or _builtin(cls.__module__) or cls.__module__.partition(".")[0]
        kinds = {f.contract: f.kind for f in _families.values()}
        try:
            if fixes:
                fix(cls, fixes)
            schema = read_schema(cls, name, _families[kind].context, kinds)
        except TypeError as error:
            raise RegistrationError(str(error)) from None
        enforced(BlockError if _families[kind].root else kind)(cls)
        entry = Entry(kind, name, cls, schema, provider)
        old = _entries[kind].get(name)
        if old and _identity(old.cls) != _identity(cls):
            raise RegistrationError(
                f"{kind} {name!r} is already registered by {old.owner}; {entry.owner} must pick another name"
            )
        _entries[kind][name] = entry
        return cls

    return put


def _builtin(module: str) -> str | None:
    return next((owner for package, owner in BUILTIN.items() if module.startswith(f"{package}.")), None)


def _identity(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@functools.cache
def load() -> None:
    """Import the built-in families, then every installed plug-in. A plug-in that fails to import only causes a warning.

    A folder is a family if its base.py declares one; other folders are ignored.
    """
    for package in BUILTIN:
        for base in sorted(Path(importlib.import_module(package).__file__ or "").parent.glob("*/base.py")):
            room = f"{package}.{base.parent.name}"
            if room in LATE.values():
                continue
            importlib.import_module(f"{room}.base")
            if any(family.contract.__module__ == f"{room}.base" for family in _families.values()):
                for block in pkgutil.iter_modules([str(base.parent)], f"{room}."):
                    importlib.import_module(block.name)
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda p: p.name):
        _load_plugin(point)


@functools.cache
def _load_kind(kind: str) -> None:
    """Import what may register a name of a kind."""
    load()
    if kind in LATE:
        package = importlib.import_module(LATE[kind])
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)


@functools.cache
def _late_names(kind: str) -> frozenset[str]:
    """The built-in names of a late kind, read from its files without importing them."""
    spec = importlib.util.find_spec(LATE[kind]) if kind in LATE else None
    folders = [] if spec is None else spec.submodule_search_locations or []
    texts = [file.read_text() for folder in folders for file in Path(folder).glob("*.py")]
    return frozenset(name for text in texts for name in re.findall(rf'^@register\("{kind}", "(\w+)"', text, re.M))


def _load_plugin(point: EntryPoint) -> None:
    owner = point.dist.name if point.dist else point.value
    try:
        with _provided_by(owner):
            point.load()
    except Exception as error:  # a plug-in's import may fail in any way; the others must still load
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"block plug-in {point.name!r} of {owner} did not load: {reason}", stacklevel=3)


@contextlib.contextmanager
def _provided_by(owner: str) -> Iterator[None]:
    token = _provider.set(owner)
    try:
        yield
    finally:
        _provider.reset(token)


def kinds(root: str | None = "model") -> list[str]:
    """The kinds of a part of the configuration, or with None all of them, in alphabetical order."""
    load()
    late = LATE if root in (None, ROOT) else ()
    return sorted({*late, *(kind for kind, family in _families.items() if root in (None, family.root))})


def layer_kinds() -> list[str]:
    """The kinds of a model in which its layers may differ, in alphabetical order."""
    return [kind for kind in kinds() if _families[kind].in_layers]


def families() -> list[Family]:
    """All families, in alphabetical order of their groups."""
    for kind in kinds(None):
        _load_kind(kind)
    return sorted(_families.values(), key=lambda family: family.group)


def groups() -> list[str]:
    """The Hydra groups of all kinds, in alphabetical order."""
    load()
    return sorted({*LATE, *(family.group for family in _families.values())})


def find_family(kind: str) -> Family:
    """The family of a kind.

    Raises:
        KeyError: no such kind
    """
    _load_kind(kind)
    return _families[kind]


def names(kind: str, pattern: str = "*") -> list[str]:
    """Names registered in ``kind`` that match a shell wildcard, in alphabetical order; none for an unknown kind."""
    load()
    return sorted(n for n in {*_entries.get(kind, {}), *_late_names(kind)} if fnmatch.fnmatchcase(n, pattern))


def lookup(kind: str, name: str) -> Entry:
    """The entry of a registered block.

    Raises:
        KeyError: no such kind, or no such name in it
    """
    _load_kind(kind)
    return _entries[kind][name]
