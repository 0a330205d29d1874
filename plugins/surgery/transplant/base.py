"""The contract of ``transplant``: the weights of a block from those of the block that it replaces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from blockwright.plugins.surgery.settings import differences, within
from blockwright.registry import Composable, family

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
        handles: paths of the settings in which the blocks may differ (settings.py), a part with all that is in
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
