"""The contract of ``transplant``: the weights of a block from those of the block that it replaces.

What a block computes with beside its numbers is read from the built block: settings of a plug-in are compared too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import Tensor, nn

from blockwright.registry import Composable, family

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


DENSE: Mapping[str, Any] = {  # what ``Transplant.example`` changes
    "vocab_size": 61,
    "d_model": 32,
    "n_layers": 2,
    "max_positions": 64,
    "init": {"std": 0.2, "depth_scaled": False},
    "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2},
    "position": {"name": "rope"},
    "ffn": {"name": "swiglu", "d_ff": 48},
    "norm": {"name": "rmsnorm"},
    "residual": {"name": "prenorm"},
}


@dataclass(frozen=True)
class Setting:
    """What a transplant may know besides the two blocks.

    Args:
        max_positions: longest sequence of the new model, in tokens
        inputs: second moment E[x xᵀ] [D,D] of the inputs x of the old block, fp64; None if it was not asked for
        seed: of whatever is drawn
    """

    max_positions: int
    inputs: Tensor | None = None
    seed: int = 0


@dataclass(frozen=True)
class Transplanted:
    """Weights of the new block.

    Args:
        tensors: names in the new block → values; what is not named stays as it was drawn
        copied: those names whose values are the old block's, at most repeated or padded with zeros
        exact: whether the new block computes what the old one did, up to rounding, if they differ in nothing but what
            the operator handles
        note: what was lost, or what makes it exact, in a few words
        drawn: how many numbers of ``tensors`` are drawn nevertheless
    """

    tensors: Mapping[str, Tensor]
    copied: frozenset[str]
    exact: bool
    note: str = ""
    drawn: int = 0


@family("transplant", root="surgery")
class Transplant(Composable):
    """An operator of surgery: old block, new block → weights of the new one.

    Both blocks are built modules, on the CPU; the old one has its weights, the new one those of its initialisation. A
    block is what fills a slot of a layer (attention, ffn, residual) or the decoder's embedding, position, norm or head.

    What it does not name in ``handles`` it knows nothing about: where the blocks differ in any other setting, or where
    another part of the new block stays as it was drawn, it is not exact, whatever it returns. What it calls exact is
    measured (plugins/surgery/ledger.py).

    Class attributes:
        automatic: whether it is taken wherever it serves, without being named
        fills: whether it serves a part of a layer that was empty; the old block is then None
        handles: paths of the settings in which the blocks may differ (``settings``), a part with all that is in
            it; ``name`` is the block's own class. Which values suit is for ``serves`` and ``exact`` to say
        example: two sets of changes to a small dense model, the old one's and the new one's, between which it is
            exact, or serves if it never is. Tests change one setting after the other around them
    """

    automatic: ClassVar[bool] = True
    fills: ClassVar[bool] = False
    handles: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]]

    def __init__(self) -> None:
        pass

    @property
    def reads_inputs(self) -> bool:
        """Whether it needs ``Setting.inputs``, for which the old model reads some text."""
        return False

    @abstractmethod
    def serves(self, old: Any, new: nn.Module) -> bool:
        """Whether it can make the new block from the old one, by their classes and shapes; both may be on meta."""

    @abstractmethod
    def __call__(self, old: Any, new: nn.Module, setting: Setting) -> Transplanted:
        """The weights of the new block.

        Raises:
            BlockError: a size of the new block does not suit, with the remedy
        """


def unhandled(operator: Transplant, old: nn.Module | None, new: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The settings in which two blocks differ, but for those that the operator handles: path → both values."""
    if old is None:
        return {}
    return {path: pair for path, pair in differences(old, new).items() if not within(path, operator.handles)}


def left_drawn(operator: Transplant, new: nn.Module, made: Transplanted) -> list[str]:
    """Names in the new block's state that stay as they were drawn, in parts that the operator does not handle."""
    return [name for name in shapes(new) if name not in made.tensors and not within(name, operator.handles)]


def shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything in a block's state."""
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
