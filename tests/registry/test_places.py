"""A node that was read names no file: every parameter that names one is marked, and refused there unopened."""

from __future__ import annotations

import inspect
import re
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hearing import opened

from blockwright import registry
from blockwright.registry import INHERIT, ConfigError, Node, Scope
from blockwright.registry.index import find_readable, index
from blockwright.registry.schema import PLACE, Parameter, conforms, names_place
from blockwright.training.configuration.instantiate import build_readable
from blockwright.training.data.corpus import Corpus

# The words by which a description or a name says that a value is a path; and what opens a value in the code of a class.
SAYS = re.compile(r"\b(folders?|files?|path|director(y|ies)|checkpoint|run's|glob)\b|_(dir|file|folder|path)\b", re.I)
OPENS = r"\b(?:Path|open|read_text|read_plain|load|read_start|checkpoint_of|from_pretrained)\((?:str\()?(?:self\.)?{}\b"
NO_PATH = {
    "data.mixture.sources": "objects of their own classes, which a run's configuration alone builds (_target_)",
    "start.surgery.transplant": "names of operators",
}
FILLED: dict[type, Any] = {int: 1, float: 0.5, bool: True, str: "x", list: [], dict: {}}


ENTRIES = [registry.lookup(kind, name) for kind in registry.kinds(None) for name in registry.names(kind)]
ALL: list[tuple[Any, Parameter]] = [(e, p) for e in ENTRIES for p in e.schema.parameters.values() if not p.child]
PLACES = [(entry, p) for entry, p in ALL if p.place]
OTHERS = [(entry, p) for entry, p in ALL if not p.place and conforms("x", p.annotation)]


def named(each: tuple[Any, Parameter]) -> str:
    entry, p = each
    return f"{entry.kind}.{entry.name}.{p.name}"


def filled(entry: Any, **given: Any) -> dict[str, Any]:
    """A node with a value for all that is required; children are the model's, so that they are looked for last."""
    node: dict[str, Any] = {"name": entry.name}
    for p in entry.schema.parameters.values():
        if p.required and not p.child:
            node[p.name] = next((v for v in FILLED.values() if conforms(v, p.annotation)), "x")
    return {**node, **given}


@pytest.fixture
def honeypot(tmp_path: Path) -> Path:
    """A file that would make a fine template, text, or table."""
    place = tmp_path / "yours"
    place.write_text("aws_secret_access_key = abcdef")
    return place


def test_a_path_in_a_node_that_was_read_is_refused_unopened_and_only_who_runs_the_program_names_files(
    honeypot: Path,
) -> None:
    for entry, p in PLACES:
        for value in (str(honeypot), f"file://{honeypot}", str(Path("..", honeypot.name)), "~"):
            node = Node(filled(entry, **{p.name: value}), "node")
            with opened(honeypot.parent) as found, pytest.raises(ConfigError) as refusal:
                registry.build(entry.kind, node, Scope({}, {}))
            assert refusal.value.path == f"node.{p.name}" and not found, (named((entry, p)), value)
        try:
            registry.build(entry.kind, Node(filled(entry, **{p.name: str(honeypot)}), "node"), Scope({}, {}, own=True))
        except ConfigError as error:  # most need what a run supplies
            assert error.rule != refusal.value.rule, named((entry, p))


def test_what_names_a_file_is_marked_and_no_other_parameter_is_opened(honeypot: Path) -> None:
    """A name, a description or the code that says so, of a parameter that is not annotated as ``Place``."""
    unmarked: list[str] = []
    for entry, p in OTHERS:
        code = "".join(inspect.getsource(c) for c in entry.cls.__mro__ if c.__module__.startswith("blockwright"))
        said = SAYS.search(p.description) or SAYS.search(p.name) or re.search(OPENS.format(re.escape(p.name)), code)
        if said and named((entry, p)) not in NO_PATH:
            unmarked.append(named((entry, p)))
        values = [v for v in (str(honeypot), [str(honeypot)], {"a": str(honeypot)}) if conforms(v, p.annotation)]
        for value in values:
            with opened(honeypot.parent) as found, suppress(Exception):
                registry.build(entry.kind, Node(filled(entry, **{p.name: value}), "node"), Scope({}, {}))
            assert not found, named((entry, p))
    assert not unmarked, "annotate them as registry.schema.Place, or say in NO_PATH why they are no paths"


def test_a_path_of_a_child_is_refused_too(honeypot: Path) -> None:
    """Of the node's own child, and of one that it takes from around it."""
    child = {"name": "jinja", "template": str(honeypot)}
    entry = registry.lookup("data", "chat")
    for nodes, own in (({}, child), ({"chat": Node(child, "data.chat")}, INHERIT)):
        with opened(honeypot.parent) as found, pytest.raises(ConfigError) as refusal:
            registry.build("data", Node(filled(entry, chat=own), "data"), Scope(nodes, {}))
        assert refusal.value.path == "data.chat.template" and not found


def test_a_folder_names_no_file_of_a_readable_class(honeypot: Path) -> None:
    for dotted in sorted(index().readable):
        cls: Any = find_readable(dotted, object)
        signature, hints = inspect.signature(cls), typing.get_type_hints(cls.__init__, include_extras=True)
        needed = {"_target_": dotted, **{k: "x" for k, p in signature.parameters.items() if p.default is p.empty}}
        for name, hint in hints.items():
            value = next((v for v in (str(honeypot), [str(honeypot)]) if conforms(v, hint)), None)
            if name not in signature.parameters or value is None:
                continue
            made = None
            with opened(honeypot.parent) as found, suppress(Exception):
                made = build_readable({**needed, name: value}, object, "data.corpus", "r")
                if isinstance(made, Corpus):  # opened later, if at all
                    list(made.paths())
                    made.check()
            assert not found and (made is None or not names_place(hint)), (dotted, name)


def test_marks_are_found_wherever_an_annotation_has_them() -> None:
    place = typing.Annotated[str, PLACE]
    assert all(map(names_place, (place, place | None, list[place], str | list[place], dict[str, place | None])))
    assert not any(map(names_place, (str, str | None, typing.Literal[PLACE], typing.Annotated[int, "other"])))
