"""The formulas of a block, read out of its docstring.

The convention (docs/how-to/add-a-block.md): the second paragraph of a block's docstring names the paper and gives what
the block computes. A formula there is ``left = right`` or ``left ← right``, and ends at ``;``, ``.``, ``:`` or a comma
outside brackets; words around it are left out. A line that is indented by four spaces is a formula as it is.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

RELATION = re.compile(r" (?:=|←|−=|\+=) ")
_OPEN, _SHUT = "([{⌊⌈", ")]}⌋⌉"
_LEADS = re.compile(r"^(?:(?:with|and|where|output|then|else|or|so that) )+", re.I)
_INNER = re.compile(r" (?:with|and|where) (?=[^ ]+(?:, [^ ]+)* (?:=|←|−=) )")
_BEFORE = re.compile(r"^.*\b[a-z]{2,} ")  # words before what is defined
_AFTER = re.compile(r" (?:(?:over|by|at|and|the)\b|\(?[a-z]{2,} [a-z]{2,} [a-z]{2,}).*$")  # words after its value
_CASE = re.compile(r" (?=(?:if|for) )")  # a condition, which is kept
_NUMBER = re.compile(r"[\d.,]*")


def equations(cls: type) -> tuple[str, ...]:
    """The formulas of a block's class, in the order of its docstring; none where it has none."""
    paragraphs = (inspect.getdoc(cls) or "").partition("\nArgs:")[0].replace("``", "").split("\n\n")
    return tuple(_formulas(paragraphs[1])) if len(paragraphs) > 1 else ()


def _formulas(paragraph: str) -> Iterator[str]:
    indented = [line.strip() for line in paragraph.splitlines() if line.startswith("    ")]
    if indented:
        yield from indented
        return
    for clause in _clauses(" ".join(paragraph.split())):
        for piece in _INNER.split(clause):
            if found := _formula(piece):
                yield found


def _clauses(text: str) -> Iterator[str]:
    """Parts of a text between the marks that end a formula."""
    depth, start, pending = 0, 0, ""
    for place, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _SHUT)
        ends = letter in ";:.," and text[place + 1 : place + 2] in ("", " ")
        if depth > 0 or not ends:
            continue
        clause, start = text[start:place].strip(), place + 1
        if letter == "," and len(_LEADS.sub("", clause)) <= 3:  # q, k, v = …
            pending += f"{clause}, "
            continue
        yield pending + clause
        pending = ""
    yield pending + text[start:].strip()


def _formula(piece: str) -> str:
    """A formula without the words around it; "" where there is none."""
    piece = _LEADS.sub("", piece.strip())
    relation = RELATION.search(piece)
    if relation is None:
        return ""
    value, case, condition = _CASE.sub("\n", piece[relation.end() :], count=1).partition("\n")
    value = _AFTER.sub("", value)
    if sum(map(value.count, _OPEN)) != sum(map(value.count, _SHUT)):  # the words were in brackets
        value = value[: max(map(value.rfind, _OPEN))]
    value = value.rstrip(" (,")
    if _NUMBER.fullmatch(value) or value.endswith("#"):
        return ""
    defined = _BEFORE.sub("", piece[: relation.start()])
    return f"{defined}{relation[0]}{value}{case and ' '}{condition}"
