"""Boxes of a picture from blocks that were built."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.attention.scored import Scored
from blockwright.blocks.base import Block, Drawn
from blockwright.blocks.convolution import Convolution
from blockwright.blocks.cost import FAR
from blockwright.blocks.memory import Memory
from blockwright.blocks.sample import signature
from blockwright.lab.drawing.parts import Box, Cached
from blockwright.registry.recording import Built
from blockwright.registry.schema import Parameter

# --- the label of a block: what it says itself, or its parameters as YAML names them ----------------------------------


def lines(built: Built, drawn: Drawn) -> tuple[str, ...]:
    """The items of a block's label: its own, or widths, counts, and what differs from its default."""
    if drawn.lines is not None:
        return drawn.lines
    known = built.entry.schema.parameters
    values = {name: built.settled(name) for name in built.settings if name not in drawn.hides}
    shown = [
        name
        for name, value in values.items()
        if value is not None and (name in drawn.shows or _telling(known[name], value))
    ]
    return tuple(_item(name, values[name]) for name in shown)


def _telling(parameter: Parameter, value: Any) -> bool:
    real = isinstance(parameter.default, float)  # 40 and 40.0 are the same
    counts = isinstance(value, int) and not isinstance(value, bool) and value != 1 and not real
    return counts or value != parameter.default


def _item(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {written(value)}"


def written(value: Any) -> str:
    """A setting in few letters: 12,288, 0.707, [a, b, …]."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value[:2]))}{', …' if len(value) > 2 else ''}]"
    return str(value)


# --- what a block caches ----------------------------------------------------------------------------------------------


def cached(block: nn.Module) -> tuple[Cached, ...]:
    """What is cached for a block itself: nothing for most.

    Raises:
        NotImplementedError: an attention makes no cache, or a memory has no reach
    """
    if isinstance(block, Convolution):
        return (Cached("inputs", block.tail, (), "state", 0, 0, prod(block.tail), False),)
    return _of_cache(block) if isinstance(block, Attention | Memory) else ()


def _of_cache(attention: Attention | Memory) -> tuple[Cached, ...]:
    widths = attention.remembered().widths() if isinstance(attention, Scored) else {}
    near, far = _buffers(attention, FAR), _buffers(attention, 2 * FAR)
    one, two = _buffers(attention, 1), _buffers(attention, 2)
    return tuple(
        _cached(name, tuple(widths.get(name, ())), *(made[name] for made in (one, two, near, far)))
        for name in far
        if far[name].numel()
    )


def _buffers(attention: Attention | Memory, length: int) -> dict[str, Tensor]:
    return attention.new_cache(1, length, torch.bfloat16, torch.device("meta")).buffers


def _cached(name: str, parts: tuple[int, ...], one: Tensor, two: Tensor, near: Tensor, far: Tensor) -> Cached:
    """One tensor, from what it is for 1, 2, FAR and 2 FAR tokens."""
    growth, wide = (far.numel() - near.numel()) / FAR, far.dtype == torch.float32
    constant = 2 * near.numel() - far.numel()
    if growth:
        shape = tuple(far.shape[2:])
        every = round(prod(shape) / growth)
        return Cached(name, shape, parts, "all" if every == 1 else "every", every, growth, constant, wide)
    if two.numel() > one.numel():
        return Cached(name, tuple(far.shape[2:]), parts, "last", far.shape[1], 0, constant, wide)
    return Cached(name, tuple(far.shape[1:]), parts, "state", 0, 0, constant, wide)


# --- the formulas of a block, read out of its docstring ---------------------------------------------------------------


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


Records = Mapping[int, Built]


def box(block: nn.Module, path: str, slot: str, records: Records) -> Box:
    """The box of a block, with those of its children.

    Args:
        block: built by the registry
        path, slot: as in ``Box``
        records: of all blocks (registry/recording.py)
    """
    built = records[id(block)]
    drawn = block.drawn() if isinstance(block, Block) else Drawn()
    used = ((slot, child) for slot, child in built.slots() if _used(child, block))
    children = (box(child, f"{path}.{slot}", slot, records) for slot, child in used)
    return Box(
        path,
        built.entry.kind,
        slot,
        built.entry.name,
        built.entry.schema.summary,
        built.path,
        lines(built, drawn),
        drawn.acts,
        drawn.chosen,
        dict(built.settings),
        count(block),
        _cached_by(block),
        tuple(children),
        equations(type(block)),
        empty=isinstance(block, Block) and block.empty,
    )


def part(path: str, kind: str, *items: str, parameters: int = 0) -> Box:
    """The box of a part of the decoder that is no block."""
    return Box(path, kind, path.rpartition(".")[2], lines=items, parameters=parameters)


def count(module: nn.Module | None) -> int:
    """Parameters of a module."""
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def _used(child: nn.Module, block: nn.Module) -> bool:
    """Whether a block has a child in it, or copies of it, as a tower has of what each of its layers needs."""
    alike = [module for module in block.modules() if type(module) is type(child)]
    return any(module is child for module in alike) or signature(child) in map(signature, alike)


def _cached_by(block: nn.Module) -> Any:
    try:
        return cached(block)
    except NotImplementedError:  # a memory without reach; a plug-in's attention may have no cache
        return ()
