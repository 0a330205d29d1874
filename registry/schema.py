"""A block's ``__init__`` signature as its configuration schema: names, types, defaults, choices, children.

It yields the typed dataclass that Hydra composes with, the table of ``blockwright blocks`` and the builder's check.
OmegaConf 2.3 cannot express every annotation (``Literal``, unions of containers): such a field is widened in the
dataclass and checked against the full annotation by ``Parameter.fault``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal, Union

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blockwright.registry import ranges
from blockwright.registry.ranges import numbers, parts, within

INHERIT = "inherit"  # default of a child: the model's, if any. null means none
# OmegaConf supports these: asking it about each parameter takes 50 ms.
_HELD = {t for plain in (int, float, str) for t in (plain, plain | None)}
PLACE = "a path of this machine"
# A file or a folder that the one who runs the program names: ``registry.build`` refuses it in a node that was read.
Place = Annotated[str, PLACE]
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "null"}


@dataclass(frozen=True)
class Parameter:
    """One configurable parameter of a block.

    Args:
        name: as in the signature
        hint: the annotation, resolved, without ranges
        annotation: the full annotation (see registry/ranges.py)
        default: its default, or ``inspect.Parameter.empty`` if required
        child: the kind of block it takes, or None for a plain value; a ``list[Contract]`` takes a list of blocks of
            that kind
        description: its line in the docstring's ``Args``
    """

    name: str
    hint: Any
    annotation: Any
    default: Any
    child: str | None
    description: str

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def optional(self) -> bool:
        """Whether it accepts None."""
        return type(None) in typing.get_args(self.hint)

    @property
    def many(self) -> bool:
        """Whether it is a list."""
        return any(typing.get_origin(part) is list for part in (self.hint, *typing.get_args(self.hint)))

    @property
    def place(self) -> bool:
        """Whether it names files or folders of this machine."""
        return names_place(self.annotation)

    @property
    def type(self) -> str:
        """The annotation as shown in the catalogue."""
        return _shown(self.annotation)

    @property
    def written(self) -> str:
        """Its default as in YAML."""
        return "null" if self.default is None else str(self.default)

    def fault(self, value: Any) -> str | None:
        """The rule that ``value`` breaks, or None if it matches the annotation."""
        return None if conforms(value, self.annotation) else fault(value, self.annotation)


@dataclass(frozen=True)
class Schema:
    """The configurable parameters of a block, and those supplied by the composer.

    Args:
        parameters: configurable ones by name, children included
        fixed: those fixed by the registration; their ``default`` is the value (see registry/catalogue.py)
        context: constructor parameters that the composer or the parent supplies
        groups: constructor parameter → the dataclass it takes, whose fields are parameters like the others
        dataclass: the typed node that Hydra composes with
        summary: first sentence of the class's docstring
    """

    parameters: Mapping[str, Parameter]
    fixed: Mapping[str, Parameter]
    context: frozenset[str]
    groups: Mapping[str, type]
    dataclass: type
    summary: str

    @cached_property
    def children(self) -> dict[str, Parameter]:
        return {name: p for name, p in self.parameters.items() if p.child}

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The constructor's arguments: values by name, those of the fields of a dataclass put into one."""
        left = dict(values)
        made = {name: group(**_taken(left, group)) for name, group in self.groups.items()}
        return {**left, **made}


def names_place(hint: Any) -> bool:
    """Whether ``Place`` is in an annotation: alone, in a list, or as one of several."""
    plain, more = parts(hint)
    return PLACE in more or any(map(names_place, typing.get_args(plain)))


def conforms(value: Any, hint: Any) -> bool:
    """Whether a plain value (from YAML) matches an annotation. An int is a float; a bool is not an int.

    A float must be finite, unless the annotation allows otherwise (registry/ranges.py).
    """
    hint, more = parts(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args)
    if origin in (Union, types.UnionType):
        return any(conforms(value, a) for a in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and within(value, more)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and within(value, more)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if (origin or hint) in (list, tuple, Sequence):
        return isinstance(value, Sequence) and not isinstance(value, str) and _items_conform(value, hint)
    if (origin or hint) is Mapping:
        return isinstance(value, Mapping)  # a constructor names the item that is wrong
    if (origin or hint) is dict:
        return isinstance(value, Mapping) and (not args or all(conforms(each, args[1]) for each in value.values()))
    return True  # a plug-in's own annotation: its constructor decides


def _items_conform(value: Sequence[Any], hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if not args:
        return True
    if origin is tuple and Ellipsis not in args:
        return len(value) == len(args) and all(conforms(v, a) for v, a in zip(value, args, strict=True))
    return all(conforms(v, args[0]) for v in value)


def fault(value: Any, hint: Any) -> str:
    """The rule broken by a value that does not match an annotation."""
    finite = ", and finite" if isinstance(value, float) and not math.isfinite(value) else ""
    return f"must be {in_words(hint)}{finite}"


def in_words(hint: Any) -> str:
    """Human-readable type name: ``int | None`` → "an integer or null", ``Count`` → "an integer of at least 1"."""
    hint, more = parts(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(a) for a in args)
    if origin in (list, tuple, Sequence):
        length = f"{len(args)} " if origin is tuple and Ellipsis not in args else ""
        return f"a list of {length}" + ", ".join(dict.fromkeys(_plural(in_words(a)) for a in args if a is not Ellipsis))
    words = (
        "a path"
        if PLACE in more
        else _WORDS.get(
            hint,
            "a list" if hint in (list, tuple) else "a mapping" if (origin or hint) in (dict, Mapping) else str(hint),
        )
    )
    return words + ranges.in_words(more)


def _plural(words: str) -> str:
    """``a number above 0 or a string`` → ``numbers above 0 or strings``."""
    return re.sub(r"\ban? (\w+)", r"\1s", words)


def _shown(hint: Any) -> str:
    """An annotation as shown in the catalogue: ``int | None``, ``float > 0``."""
    hint, more = parts(hint)
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " | ".join(_shown(part) for part in typing.get_args(hint))
    text = (
        "path"
        if PLACE in more
        else hint.__name__
        if isinstance(hint, type) and not typing.get_args(hint)
        else str(hint)
    )
    if any(within_it for _, within_it in numbers(hint)):  # a list of numbers with ranges
        inner = ", ".join("..." if part is Ellipsis else _shown(part) for part in typing.get_args(hint))
        text = f"{typing.get_origin(hint).__name__}[{inner}]"
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text).replace("NoneType", "None") + ranges.in_signs(more)


def _taken(values: dict[str, Any], group: Any) -> dict[str, Any]:
    """The values of the fields of a dataclass, removed from ``values``."""
    return {f.name: values.pop(f.name) for f in dataclasses.fields(group) if f.name in values}


def read_schema(cls: type, name: str, context: frozenset[str], kinds: Mapping[type, str]) -> Schema:
    """Read the constructor of ``cls``.

    Args:
        cls: the block's class
        name: the name it is registered under; becomes the ``name`` key of its node
        context: parameters supplied by the composer, never configured
        kinds: contract class → kind; a parameter with such an annotation is a child

    Raises:
        TypeError: the constructor takes ``*args`` or ``**kwargs``
    """
    constructor = inspect.getattr_static(cls, "__init__")
    plain = typing.get_type_hints(constructor)  # resolves postponed annotations
    groups = {key: hint for key, hint in plain.items() if _is_group(hint, kinds)}
    described = (*(base for group in groups.values() for base in reversed(group.__mro__)), *reversed(cls.__mro__))
    texts = {name: text for base in described for name, text in documented(base).items()}

    def read(owner: Any) -> Iterator[Parameter]:
        hints, annotations = typing.get_type_hints(owner), typing.get_type_hints(owner, include_extras=True)
        for key, default in _defaults(owner).items():
            if key in groups:
                yield from read(groups[key])
            else:
                hint = hints.get(key, Any)
                child, text = _child_kind(hint, kinds), texts.get(key, "")
                yield Parameter(key, hint, annotations.get(key, Any), default, child, text)

    found, held = {p.name: p for p in read(constructor)}, fixed_by(constructor)
    parameters = {key: p for key, p in found.items() if key not in held and key not in context}
    fixed = {key: found[key] for key in held}
    summary = _docstring(cls).partition("\n\n")[0].replace("\n", " ")
    used = frozenset(found.keys() & context)
    return Schema(parameters, fixed, used, groups, _dataclass(cls, name, parameters), summary)


def _or_empty(default: Any) -> Any:
    return inspect.Parameter.empty if default is dataclasses.MISSING else default


def _is_group(hint: Any, kinds: Mapping[type, str]) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint) and hint not in kinds


def _defaults(owner: Any) -> dict[str, Any]:
    """Parameter of a constructor, or field of a dataclass → its default, ``empty`` for none; fixed ones have a value.

    Raises:
        TypeError: the constructor takes ``*args`` or ``**kwargs``
    """
    if dataclasses.is_dataclass(owner):
        made = {f.name: f.default_factory() for f in dataclasses.fields(owner) if callable(f.default_factory)}
        return {f.name: made.get(f.name, _or_empty(f.default)) for f in dataclasses.fields(owner)}
    parameters = list(inspect.signature(owner).parameters.values())[1:]
    for p in parameters:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            rule = f"{owner.__qualname__} takes *{p.name}: name every parameter, so that typos are refused"
            raise TypeError(rule)
    return {**{p.name: p.default for p in parameters}, **fixed_by(owner)}


def fixed_by(constructor: Any) -> Mapping[str, Any]:
    """The parameters that a constructor passes with a fixed value (registry/catalogue.py), and these values."""
    return getattr(constructor, "_fixes", {})


def _child_kind(hint: Any, kinds: Mapping[type, str]) -> str | None:
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and candidate in kinds:
            return kinds[candidate]
        if typing.get_origin(candidate) is list and (kind := _child_kind(typing.get_args(candidate)[0], kinds)):
            return kind
    return None


def _docstring(cls: type) -> str:
    """Without the marks around names of code, which a terminal would show."""
    return (inspect.getdoc(cls) or "").replace("``", "")


def documented(cls: type) -> dict[str, str]:
    """The ``Args`` section of a docstring: parameter → its text, continuation lines joined."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", _docstring(cls), re.M)
    found: dict[str, str] = {}
    last = None
    for line in section[1].splitlines() if section else ():
        if head := re.match(r"    (\w+): (.*)", line):
            last = head[1]
            found[last] = head[2]
        elif last and line.strip():
            found[last] += " " + line.strip()
    return found


def _dataclass(cls: type, name: str, parameters: Mapping[str, Parameter]) -> type:
    """The typed Hydra node, reachable as ``module.Class.Config`` so that composed configurations can be pickled."""
    fields: list[Any] = [("name", str, field(default=name))]
    for p in parameters.values():
        annotation = Any if p.child else _for_omegaconf(p)
        default = INHERIT if p.child else MISSING if p.required else p.default
        fields.append((p.name, annotation, _field(list(default) if isinstance(default, tuple) else default)))
    made_class = dataclasses.make_dataclass(f"{cls.__name__}Config", fields)
    made_class.__module__, made_class.__qualname__ = cls.__module__, f"{cls.__qualname__}.Config"
    cls.Config = made_class  # type: ignore[attr-defined]
    return made_class


def _field(default: Any) -> Any:
    mutable = isinstance(default, list | dict)
    return field(default_factory=functools.partial(copy.copy, default)) if mutable else field(default=default)


def _for_omegaconf(p: Parameter) -> Any:
    """The annotation, if OmegaConf supports it, else Any.

    A bool is left to ``Parameter.fault``: OmegaConf would convert 2 and "on" to true.
    """
    if p.hint in _HELD:
        return p.hint
    if p.hint in (bool, bool | None):
        return Any
    plain = Any if typing.get_origin(p.hint) in (Literal, tuple) else p.hint
    sample = field(default=MISSING)
    try:
        OmegaConf.structured(dataclasses.make_dataclass("Probe", [(p.name, plain, sample)]))
    except OmegaConfBaseException:
        return Any
    return plain
