"""Annotations and registered blocks as JSON Schema (draft 7), which editors complete and check YAML by.

A schema says what can be said of one value: its type, its range, its choices, its keys. Rules between two values are
those of the constructors, and no schema has them. ``${…}`` is taken for any value where the file may interpolate.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, is_dataclass
from typing import Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt

from blockwright.registry import catalogue
from blockwright.registry.ranges import parts
from blockwright.registry.reading import hinted_fields
from blockwright.registry.schema import INHERIT, Parameter, documented

Schema = dict[str, Any]
_PLAIN = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}
_BOUNDS = {Ge: "minimum", Gt: "exclusiveMinimum", Le: "maximum", Lt: "exclusiveMaximum"}
INTERPOLATION: Schema = {"type": "string", "pattern": r"\$\{"}
TOLD = ("description", "default")  # of one value, and no rule
DRAFT = "http://json-schema.org/draft-07/schema#"


def of(hint: Any) -> Schema:
    """The schema of an annotation; that of a class of which nothing is known takes everything."""
    hint, more = parts(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        bounds = {_BOUNDS[type(b)]: getattr(b, type(b).__name__.lower()) for b in more if type(b) in _BOUNDS}
        return {"type": _PLAIN[hint], **bounds}
    if origin is Literal:
        return {"enum": list(args)}
    if origin in (Union, types.UnionType):
        return any_of([of(each) for each in args])
    if (origin or hint) in (list, tuple, Sequence):
        if origin is tuple and args and Ellipsis not in args:
            return {"type": "array", "items": [of(each) for each in args], "minItems": len(args), "maxItems": len(args)}
        return {"type": "array", "items": of(args[0])} if args else {"type": "array"}
    if (origin or hint) in (dict, Mapping):
        return {"type": "object", "additionalProperties": of(args[1])} if args else {"type": "object"}
    return dataclass(hint) if isinstance(hint, type) and is_dataclass(hint) else {}


def any_of(schemas: Sequence[Schema]) -> Schema:
    """What one of several takes; each once."""
    schemas = [inner for each in schemas for inner in (each["anyOf"] if each.keys() == {"anyOf"} else [each])]
    distinct = [each for i, each in enumerate(schemas) if each not in schemas[:i]]
    return {} if {} in distinct else distinct[0] if len(distinct) == 1 else {"anyOf": distinct}


def dataclass(cls: type) -> Schema:
    """The mapping that ``registry.reading.read`` takes for a dataclass. The only item of a tuple may stand alone."""
    texts = documented(cls)
    known = {key: (field, of(hint)) for key, (field, hint) in hinted_fields(cls).items()}
    required = [key for key, (field, _) in known.items() if field.default is field.default_factory is MISSING]
    return mapping(
        {key: told(_alone(schema), texts.get(field.name, ""), field.default) for key, (field, schema) in known.items()},
        required,
    )


def _alone(schema: Schema) -> Schema:
    """A schema of a tuple that takes its only item too."""
    inner = schema.get("anyOf", [schema])
    items = [each["items"] for each in inner if each.get("type") == "array" and isinstance(each.get("items"), dict)]
    return any_of([*inner, *items])


def mapping(properties: Mapping[str, Schema], required: Sequence[str] = (), *, is_open: bool = False) -> Schema:
    """A mapping with these keys, and no others unless it is open."""
    closed = {} if is_open else {"additionalProperties": False}
    return {
        "type": "object",
        "properties": dict(properties),
        **({"required": list(required)} if required else {}),
        **closed,
    }


def told(schema: Schema, text: str, default: Any = MISSING) -> Schema:
    """A schema with a description and a default, for those who hover."""
    plain = isinstance(default, bool | int | str) or (isinstance(default, float) and math.isfinite(default))
    return {**schema, **({"description": text} if text else {}), **({"default": default} if plain else {})}


def interpolated(schema: Schema) -> Schema:
    """A schema that takes ``${…}`` too; its description and default stay beside both."""
    plain = {key: value for key, value in schema.items() if key not in TOLD}
    return {**any_of([plain, INTERPOLATION]), **{key: schema[key] for key in TOLD if key in schema}}


# --- blocks: a definition for each kind, to which nodes refer ---


class Blocks:
    """The definitions of the kinds that a document refers to.

    Args:
        interpolates: whether ``${…}`` stands for any value

    Attributes:
        definitions: of the kinds that were asked for, and of those of their children
    """

    def __init__(self, interpolates: bool = False) -> None:
        self.interpolates = interpolates
        self.definitions: dict[str, Schema] = {}

    def node(self, kind: str, optional: bool = True) -> Schema:
        """What stands for a block of a kind: a name, or a mapping with or without one, or null."""
        key = f"{kind} or null" if optional else kind
        if key not in self.definitions:
            if not (names := catalogue.names(kind)):  # its options are files
                return {}
            self.definitions[key] = {}  # a child may be of the same kind
            alone = {"type": "string", "enum": [*names, INHERIT]}
            none: list[Schema] = [{"type": "null"}] if optional else []
            self.definitions[key] = {"anyOf": [self.value(alone), self._of_names(kind, names), *none]}
        return {"$ref": f"#/definitions/{key}"}

    def value(self, schema: Schema) -> Schema:
        """A schema of a value that may be interpolated, if the document may."""
        return interpolated(schema) if self.interpolates else schema

    def _of_names(self, kind: str, names: Sequence[str]) -> Schema:
        """A mapping of which ``name`` says what other keys it has; without one, those of any block of the kind."""
        key = f"{kind}: mapping"
        if key not in self.definitions:
            self.definitions[key] = {}
            known = {name: self._parameters(kind, name) for name in names}
            shared: dict[str, list[Schema]] = {}
            for properties in known.values():
                for parameter, schema in properties.items():
                    shared.setdefault(parameter, []).append({k: v for k, v in schema.items() if k not in TOLD})
            without = {parameter: any_of(schemas) for parameter, schemas in shared.items()}
            named = [
                {
                    "if": {"properties": {"name": {"const": name}}, "required": ["name"]},
                    "then": mapping({"name": self._name(kind, name), **properties}),
                }
                for name, properties in known.items()
            ]
            self.definitions[key] = {
                "type": "object",
                "properties": {"name": {"enum": list(names)}},
                "allOf": [*named, {"if": {"not": {"required": ["name"]}}, "then": mapping(without)}],
            }
        return {"$ref": f"#/definitions/{key}"}

    def _name(self, kind: str, name: str) -> Schema:
        return {"const": name, "description": catalogue.lookup(kind, name).schema.summary}

    def _parameters(self, kind: str, name: str) -> dict[str, Schema]:
        schema = catalogue.lookup(kind, name).schema
        return {key: told(self._parameter(p), p.description, p.default) for key, p in schema.parameters.items()}

    def _parameter(self, p: Parameter) -> Schema:
        if p.child is None:
            return self.value(of(p.annotation))
        node = self.node(p.child, p.optional)
        return any_of([node, {"type": "array", "items": node}]) if p.many else node
