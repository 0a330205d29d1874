"""The contract of ``transplant``: the weights of a block from those of the block that it replaces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from registry import Composable, family


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
        exact: whether the new block computes what the old one did, up to rounding
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

    Class attributes:
        automatic: whether it is taken wherever it serves, without being named
    """

    automatic: ClassVar[bool] = True

    def __init__(self) -> None:
        pass

    @property
    def reads_inputs(self) -> bool:
        """Whether it needs ``Setting.inputs``, for which the old model reads some text."""
        return False

    @abstractmethod
    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        """Whether it can make the new block from the old one, by their classes and shapes; both may be on meta."""

    @abstractmethod
    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        """The weights of the new block.

        Raises:
            BlockError: a size of the new block does not suit, with the remedy
        """


def shapes(block: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of everything in a block's state."""
    return {name: tuple(tensor.shape) for name, tensor in block.state_dict().items()}
