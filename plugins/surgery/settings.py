"""What a block computes with beside its numbers, read from the built block: a plug-in's settings are compared too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import nn

NAME = "name"  # path of what the block itself is
_ABSENT = object()  # equal to no setting
_TENSOR = "a tensor"
_INTERNAL = frozenset(vars(nn.Module())) | {"kernels"}  # another kernel computes the same
# What the shapes of tensors say already.
_SIZES = {"d_model", "in_features", "out_features", "num_embeddings", "embedding_dim", "normalized_shape"}
# Members that a class has to be built and described, and does not compute with.
_BUILDING = {
    "Config",
    "conformance_settings",
    "conformance_model",
    "default_children",
    "child_context",
    "parallel_plan",
    "counted_as",
    "drawn",
    "neutral",
}


def settings(block: nn.Module) -> dict[str, Any]:
    """Path in the block → value: the class of each part, each attribute that a part stores, and which tensors it has.

    Numbers and shapes of tensors are left out. An attribute that is no plain value counts by its ``repr``.
    """
    found: dict[str, Any] = {}
    for path, part in block.named_modules():
        found[path or NAME] = type(part)
        own = {**vars(part), **dict.fromkeys(name for name, _ in _tensors(part))}
        for name in own.keys() - _INTERNAL - _SIZES:
            found[f"{path}.{name}".lstrip(".")] = _plain(own[name]) if name in vars(part) else _TENSOR
    return found


def differences(old: nn.Module, new: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Path → value of the old and of the new block, for each setting in which they differ.

    Of a part that is of another class, or that one of them lacks, the path of the part alone. Classes that differ only
    in how they are built and described are the same.
    """
    there, here = settings(old), settings(new)
    found: dict[str, tuple[Any, Any]] = {}
    for path in sorted({**there, **here}, key=lambda path: (path != NAME, path)):
        pair = there.get(path, _ABSENT), here.get(path, _ABSENT)
        if not _same(*pair) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = pair
    return found


def within(path: str, parts: tuple[str, ...]) -> bool:
    """Whether a path is one of these, or inside one."""
    return any(path == part or path.startswith(f"{part}.") for part in parts)


def shown(found: Mapping[str, tuple[Any, Any]], most: int = 3) -> str:
    """Differences in a few words: ``position.theta 10000.0 → 500000.0``."""
    listed = [f"{path} {_word(old)} → {_word(new)}" for path, (old, new) in found.items()]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def _tensors(part: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from part.named_parameters(recurse=False)
    yield from part.named_buffers(recurse=False)


def _plain(value: Any) -> Any:
    """The value itself where it can be compared, else how it is written."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, type) and isinstance(other, type):
        return computes_alike(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    flags = isinstance(one, bool) == isinstance(other, bool)  # 1 is 1.0, and is not true
    return (one == other and flags) or {one, other} == {None, _ABSENT}


def computes_alike(one: type, other: type) -> bool:
    """Whether two classes differ at most in how they are built and described."""
    return one is other or _members(one) == _members(other)


@cache
def _members(cls: type) -> dict[str, Any]:
    """What a class computes with: everything that it defines or inherits, but for its building."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        if base not in nn.Module.__mro__:
            found |= {k: v for k, v in vars(base).items() if not k.startswith(("__", "_abc")) and k not in _BUILDING}
    return found


def _word(value: Any) -> str:
    if isinstance(value, type):
        text = value.__name__
    else:
        absent = value is None or value is _ABSENT
        text = "none" if absent else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
