"""A constructor's signature read as its configuration, and the values that conform to it."""

from __future__ import annotations

import dataclasses
import keyword
import pickle
import typing
from collections.abc import Mapping
from typing import Any, Literal, Optional, Union

from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import MISSING, OmegaConf

from blockwright import registry
from blockwright.registry.schema import Schema, conforms, documented, in_words, read_schema

EVERY = [(kind, name) for kind in registry.kinds() for name in registry.names(kind)]


class Child:
    pass


def read(init: Any, doc: str = "A block.", context: tuple[str, ...] = ("d_model",)) -> Schema:
    cls = type("Example", (), {"__init__": init, "__doc__": doc, "__module__": __name__})
    return read_schema(cls, "example", frozenset(context), {Child: "child"})


# --- reading ----------------------------------------------------------------------------------------------------------


def test_parameters_context_and_children_are_told_apart() -> None:
    def init(self, d_model: int, child: Child, width: int, spare: Child | None = None, *, depth: int = 3) -> None: ...
    def without(self, width: int = 1) -> None: ...

    schema = read(init)
    assert schema.context == {"d_model"} and read(without).context == frozenset()
    assert {n: (p.child, p.required, p.optional) for n, p in schema.parameters.items()} == {
        "child": ("child", True, False),
        "width": (None, True, False),
        "spare": ("child", False, True),
        "depth": (None, False, False),
    }
    assert set(schema.children) == {"child", "spare"} and schema.parameters["depth"].default == 3


def test_descriptions_come_from_the_args_section_continuation_lines_joined() -> None:
    doc = """First sentence
    over two lines.

    More: not a parameter.

    Args:
        width: how wide; colons: fine
        depth: how deep it goes,
            which may take a while
            to say

        name_2: after a blank line

    Returns:
        other: not a parameter either
    """

    def init(self, width: int = 1, depth: int = 2, name_2: int = 3, other: int = 4) -> None: ...

    schema = read(init, doc)
    assert schema.summary == "First sentence over two lines." and read(init, "").summary == ""
    assert {n: p.description for n, p in schema.parameters.items()} == {
        "width": "how wide; colons: fine",
        "depth": "how deep it goes, which may take a while to say",
        "name_2": "after a blank line",
        "other": "",
    }


# --- the dataclass that Hydra composes with ---------------------------------------------------------------------------


def test_dataclass_has_a_name_defaults_and_missing_values() -> None:
    def init(
        self, d_model: int, child: Child, width: int, sizes: tuple[int, ...] = (1, 2), m: dict = {"a": 1}  # noqa: B006
    ) -> None: ...  # fmt: skip

    made, other = read(init).dataclass(), read(init).dataclass()
    expected = {"name": "example", "child": "inherit", "width": MISSING, "sizes": [1, 2], "m": {"a": 1}}
    assert dataclasses.asdict(made) == expected
    assert made.sizes is not other.sizes and made.m is not other.m


VALUES: dict[Any, st.SearchStrategy] = {
    int: st.integers(-(2**31), 2**31),
    float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9).map(float),
    bool: st.booleans(),
    str: st.text("abc_ ", max_size=5),
    (int | None): st.none() | st.integers(0, 9),
    Optional[float]: st.none() | st.floats(0, 1),  # noqa: UP045
    Literal["tanh", "none"]: st.sampled_from(["tanh", "none"]),
    (int | str): st.integers(0, 9) | st.sampled_from(["auto"]),
    list[int]: st.lists(st.integers(0, 9), max_size=3),
    tuple[float, float]: st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dict[str, int]: st.dictionaries(st.sampled_from("ab"), st.integers(0, 9)),
}


@st.composite
def signatures(draw: st.DrawFn) -> list[tuple[str, Any, Any]]:
    """Names, annotations and defaults of constructors one might write."""
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True), unique=True, max_size=5))
    names = [n for n in names if n not in ("name", "self", "d_model") and not keyword.iskeyword(n)]
    hints = [draw(st.sampled_from(list(VALUES))) for _ in names]
    return [(n, h, draw(VALUES[h])) for n, h in zip(names, hints, strict=True)]


@settings(max_examples=25)
@given(signatures())
def test_any_signature_makes_a_node_that_comes_back_whole_and_conforms(signature: list[tuple[str, Any, Any]]) -> None:
    scope: dict[str, Any] = {"typing": typing}
    arguments = ", ".join(["self", *(f"{n}=defaults[{i}]" for i, (n, _, _) in enumerate(signature))])
    exec(f"def init({arguments}): pass", {"defaults": [d for *_, d in signature]}, scope)
    scope["init"].__annotations__ = {n: h for n, h, _ in signature}
    schema = read(scope["init"])
    node = OmegaConf.structured(schema.dataclass)
    plain = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(node)))
    assert plain.pop("name") == "example" and list(plain) == [n for n, _, _ in signature]
    for name, hint, default in signature:
        p = schema.parameters[name]
        assert p.default == default and p.hint == hint and not p.required
        assert p.fault(default) is None and p.fault(plain[name]) is None
        assert plain[name] == (list(default) if isinstance(default, tuple) else default)


# --- conformance ------------------------------------------------------------------------------------------------------

FITS: list[tuple[Any, list[Any], list[Any]]] = [
    (int, [1], [True, 1.0, "1", None]),
    (float, [1, 1.5], [True, "1.5", float("nan")]),
    (bool, [True], [1, "true"]),
    (str, ["a"], [1]),
    (type(None), [None], []),
    (int | None, [None], [True]),
    (Optional[int], [3], []),  # noqa: UP045
    (Union[int, str], ["a"], []),  # noqa: UP007
    (int | str, [], [1.5]),
    (Literal["a", "b"], ["a"], ["c"]),
    (Literal[1], [], [True]),
    (Literal[True], [], [1]),
    (Literal[1, "x"], [1], []),
    (Literal["a"] | None, [None], []),
    (list[int], [[1, 2], (1, 2), []], [[1, "2"], [True], {"a": 1}]),
    (list[str], [], ["12"]),
    (list, [[1, "a"]], []),
    (tuple[int, float], [[1, 2.5]], [[1]]),
    (tuple[int, ...], [[1, 2, 3]], []),
    (list[int | None], [[1, None]], []),
    (list[list[int]], [[[1], [2]]], [[[1], ["a"]]]),
    (dict, [{"a": 1}], [[1]]),
    (dict[str, int], [{"a": 1}], []),
    (Child, [object()], []),  # the class's own: its constructor judges
    (Any, [object()], []),
]


def test_value_conforms_or_not() -> None:
    for hint, fits, unfit in FITS:
        assert all(conforms(value, hint) is True for value in fits), hint
        assert all(conforms(value, hint) is False for value in unfit), hint


HINTS = [
    int,
    float,
    bool,
    str,
    int | None,
    Literal["a", 1],
    list[int],
    tuple[int, str],
    tuple[int, ...],
    dict[str, int],
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@settings(max_examples=25)
@given(st.recursive(SCALARS, lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_any_value_is_judged_without_an_exception(value: Any) -> None:
    for hint in HINTS:
        verdict = conforms(value, hint)
        assert isinstance(verdict, bool) and conforms([value], list[hint]) is verdict  # type: ignore[valid-type]
        assert conforms(value, hint | None) == (verdict or value is None)
    assert sum(conforms(value, h) for h in (int, bool, str, type(None))) <= 1


def test_annotation_reads_as_words_and_as_one_writes_it() -> None:
    def init(self, x: Any) -> None: ...

    rows = {
        int | None: ("an integer or null", "int | None"),
        bool: ("true or false", "bool"),
        Literal["a", "b"]: ("one of a, b", "Literal['a', 'b']"),
        list[str | int] | None: ("a list of strings or integers or null", "list[str | int] | None"),
        tuple[float, float]: ("a list of 2 numbers", "tuple[float, float]"),
        tuple[int, ...]: ("a list of integers", "tuple[int, ...]"),
        dict[str, int] | None: ("a mapping or null", "dict[str, int] | None"),
    }
    for hint, (words, written) in rows.items():
        init.__annotations__["x"] = hint
        assert (in_words(hint), read(init).parameters["x"].type) == (words, written)


# --- every registered block -------------------------------------------------------------------------------------------


def test_every_block_and_each_of_its_parameters_and_nothing_else_is_described() -> None:
    wrong: list[tuple[str, ...]] = []
    for kind, name in EVERY:
        entry = registry.lookup(kind, name)
        if not entry.schema.summary.endswith(".") or len(entry.schema.summary) <= 20:
            wrong.append((kind, name))
        if entry.cls.__doc__ is entry.cls.__mro__[1].__doc__:
            wrong.append((kind, name, "the docstring of another block"))
        found = entry.schema.parameters
        wrong += [(kind, name, n) for n, p in found.items() if len(p.description) <= 5 or p.hint is Any]
        wrong += [(kind, name, gone) for gone in set(documented(entry.cls)) - set(found)]
    assert not wrong


def test_node_of_every_block_pickles_and_its_defaults_conform() -> None:
    for kind, name in EVERY:
        schema = registry.lookup(kind, name).schema
        node = OmegaConf.structured(schema.dataclass)
        assert pickle.loads(pickle.dumps(node)) == node, (kind, name)
        assert pickle.loads(pickle.dumps(schema.dataclass())) == schema.dataclass(), (kind, name)
        for p in schema.parameters.values():
            assert p.required or p.child or p.fault(p.default) is None, (kind, name, p.name)
        assert isinstance(schema.parameters, Mapping)
