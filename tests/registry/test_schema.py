"""A constructor's signature read as its configuration."""

from __future__ import annotations

import dataclasses
import pickle
import typing
from collections.abc import Mapping
from typing import Any, Literal, Optional, Union

import pytest
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
    def init(self, d_model: int, child: Child, width: int, spare: Child | None = None, depth: int = 3) -> None: ...

    schema = read(init)
    assert schema.context == {"d_model"}
    assert {n: (p.child, p.required, p.optional) for n, p in schema.parameters.items()} == {
        "child": ("child", True, False),
        "width": (None, True, False),
        "spare": ("child", False, True),
        "depth": (None, False, False),
    }
    assert set(schema.children) == {"child", "spare"}
    assert schema.parameters["depth"].default == 3


def test_unused_context_is_not_claimed() -> None:
    def init(self, width: int = 1) -> None: ...

    assert read(init).context == frozenset()


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
    assert schema.summary == "First sentence over two lines."
    assert {n: p.description for n, p in schema.parameters.items()} == {
        "width": "how wide; colons: fine",
        "depth": "how deep it goes, which may take a while to say",
        "name_2": "after a blank line",
        "other": "",
    }


def test_class_without_a_docstring_has_an_empty_summary() -> None:
    def init(self, width: int = 1) -> None: ...

    assert read(init, "").summary == ""


@pytest.mark.parametrize("kind", ["args", "kwargs"])
def test_open_ended_constructor_is_a_type_error(kind: str) -> None:
    def args(self, *rest: int) -> None: ...

    def kwargs(self, **rest: int) -> None: ...

    with pytest.raises(TypeError, match="typos are refused"):
        read({"args": args, "kwargs": kwargs}[kind])


def test_keyword_only_parameters_are_parameters() -> None:
    def init(self, d_model: int, *, width: int = 2) -> None: ...

    assert set(read(init).parameters) == {"width"}


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "int"),
        (int | None, "int | None"),
        (Literal["a", "b"], "Literal['a', 'b']"),
        (list[int], "list[int]"),
        (Child, "Child"),
    ],
    ids=str,
)
def test_type_reads_as_one_writes_it(hint: Any, text: str) -> None:
    def init(self, x: Any) -> None: ...

    init.__annotations__["x"] = hint
    assert read(init).parameters["x"].type == text


# --- the dataclass that Hydra composes with ---------------------------------------------------------------------------


def test_dataclass_has_a_name_defaults_and_missing_values() -> None:
    def init(
        self,
        d_model: int,
        child: Child,
        width: int,
        eps: float = 0.1,
        sizes: tuple[int, ...] = (1, 2),
        m: dict = {"a": 1},  # noqa: B006
    ) -> None: ...

    schema = read(init)
    assert dataclasses.asdict(schema.dataclass()) == {
        "name": "example", "child": "inherit", "width": MISSING, "eps": 0.1, "sizes": [1, 2], "m": {"a": 1},
    }  # fmt: skip
    assert schema.dataclass().sizes is not schema.dataclass().sizes and schema.dataclass().m is not schema.dataclass().m


def test_omegaconf_holds_types_where_it_can() -> None:
    def init(self, a: int = 1, b: float | None = None, c: Literal["x", "y"] = "x", d: bool = False) -> None: ...

    node = OmegaConf.structured(read(init).dataclass)
    for key, wrong in (("a", "wide"), ("b", "wide")):
        with pytest.raises(Exception, match="could not be converted"):
            node[key] = wrong
    node.c = "z"  # beyond OmegaConf: the builder refuses it
    node.d = 2  # and this it would take for true
    assert node.d == 2
    with pytest.raises(Exception, match="not in"):
        node.e = 1


@st.composite
def signatures(draw: st.DrawFn) -> list[tuple[str, Any, Any]]:
    """Names, annotations and defaults of constructors one might write."""
    values: dict[Any, st.SearchStrategy] = {
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
    names = draw(st.lists(st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True), unique=True, max_size=5))
    keywords = {
        "name",
        "self",
        "d_model",
        "class",
        "if",
        "in",
        "is",
        "or",
        "and",
        "as",
        "def",
        "del",
        "for",
        "not",
        "try",
    }
    hints = [draw(st.sampled_from(list(values))) for _ in names]
    return [(n, h, draw(values[h])) for n, h in zip(names, hints, strict=True) if n not in keywords]


@settings(max_examples=25)
@given(signatures())
def test_any_signature_makes_a_node_that_comes_back_whole_and_conforms(signature: list[tuple[str, Any, Any]]) -> None:
    scope: dict[str, Any] = {"typing": typing}
    arguments = ", ".join(f"{n}=defaults[{i}]" for i, (n, _, _) in enumerate(signature))
    exec(
        f"def init(self, {arguments}): pass" if signature else "def init(self): pass",
        {"defaults": [d for *_, d in signature]},
        scope,
    )
    scope["init"].__annotations__ = {n: h for n, h, _ in signature}
    schema = read(scope["init"])
    node = OmegaConf.structured(schema.dataclass)
    plain = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(node)))
    assert plain.pop("name") == "example"
    assert list(plain) == [n for n, _, _ in signature]
    for name, hint, default in signature:
        p = schema.parameters[name]
        assert p.default == default and p.hint == hint and not p.required
        assert p.fault(default) is None
        assert p.fault(plain[name]) is None
        assert plain[name] == (list(default) if isinstance(default, tuple) else default)


# --- conformance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        ("1", int, False),
        (None, int, False),
        (1, float, True),
        (1.5, float, True),
        (True, float, False),
        ("1.5", float, False),
        (float("nan"), float, False),
        (True, bool, True),
        (1, bool, False),
        ("true", bool, False),
        ("a", str, True),
        (1, str, False),
        (None, type(None), True),
        (None, int | None, True),
        (3, Optional[int], True),  # noqa: UP045
        (True, int | None, False),
        ("a", Union[int, str], True),  # noqa: UP007
        (1.5, int | str, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (True, Literal[1], False),
        (1, Literal[True], False),
        (1, Literal[1, "x"], True),
        (None, Literal["a"] | None, True),
        ([1, 2], list[int], True),
        ((1, 2), list[int], True),
        ([], list[int], True),
        ([1, "2"], list[int], False),
        ([True], list[int], False),
        ("12", list[str], False),
        ([1, "a"], list, True),
        ([1, 2.5], tuple[int, float], True),
        ([1], tuple[int, float], False),
        ([1, 2, 3], tuple[int, ...], True),
        ([1, None], list[int | None], True),
        ([[1], [2]], list[list[int]], True),
        ([[1], ["a"]], list[list[int]], False),
        ({"a": 1}, dict, True),
        ({"a": 1}, dict[str, int], True),
        ([1], dict, False),
        ({"a": 1}, list[int], False),
        (object(), Child, True),  # the class's own: its constructor judges
        (object(), Any, True),
    ],
    ids=lambda value: repr(value).split(" at 0x")[0],
)
def test_value_conforms_or_not(value: Any, hint: Any, fits: bool) -> None:
    assert conforms(value, hint) is fits


@settings(max_examples=25)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_value_is_judged_without_an_exception(value: Any) -> None:
    hints = [
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
    for hint in hints:
        verdict = conforms(value, hint)
        assert isinstance(verdict, bool)
        assert conforms(value, hint | None) == (verdict or value is None)
        assert conforms([value], list[hint]) is verdict
    assert sum(conforms(value, h) for h in (int, bool, str, type(None))) <= 1


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "an integer"),
        (int | None, "an integer or null"),
        (float, "a number"),
        (bool, "true or false"),
        (Literal["a", "b"], "one of a, b"),
        (list[int], "a list of integers"),
        (list[str | int] | None, "a list of strings or integers or null"),
        (tuple[float, float], "a list of 2 numbers"),
        (dict[str, int] | None, "a mapping or null"),
        (tuple[int, ...], "a list of integers"),
        (list, "a list"),
        (dict, "a mapping"),
    ],
    ids=str,
)
def test_annotation_reads_as_words(hint: Any, words: str) -> None:
    assert in_words(hint) == words


# --- every registered block -------------------------------------------------------------------------------------------


def test_every_block_and_each_of_its_parameters_and_nothing_else_is_described() -> None:
    wrong: list[tuple[str, ...]] = []
    for kind, name in EVERY:
        entry = registry.lookup(kind, name)
        if not entry.schema.summary.endswith(".") or len(entry.schema.summary) <= 20:
            wrong.append((kind, name))
        if entry.cls.__doc__ is entry.cls.__mro__[1].__doc__:
            wrong.append((kind, name, "the docstring of another block"))
        for parameter, p in entry.schema.parameters.items():
            if len(p.description) <= 5 or p.hint is Any:
                wrong.append((kind, name, parameter))
        wrong += [(kind, name, gone) for gone in set(documented(entry.cls)) - set(entry.schema.parameters)]
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
