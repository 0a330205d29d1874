"""What every block answers, whatever its family.

Shape legend of all docstrings here: B batch, T time, S keys seen, D model width, N query heads, K KV heads, H head
width, R rotated width, C latent width, E experts, k experts a token, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from blocks.kernels.choice import Kernels
from registry import Composable

Placement = Literal["column", "row", "expert", "replicate"]


class Block(nn.Module, Composable):
    """Base of every family's contract: an ``nn.Module`` that describes itself as data.

    Class attributes:
        residual_outputs: qualified names of the parameters whose product is added to the residual stream; the
            depth-scaled initialisation shrinks exactly these
        causal: whether what it does for a token is the same whatever tokens follow; False for gates that choose over
            the whole batch
        conformance_settings: parameters that its conformance checks are to use, where the defaults leave another
            parameter without effect; small values

    Attributes:
        kernels: the implementations it computes through; the decoder it is built into sets them
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = True
    conformance_settings: ClassVar[Mapping[str, Any]] = {}
    kernels: Kernels = Kernels()

    def reset_parameters(self) -> None:
        """Set own parameters and buffers that the decoder's initialisation rule does not suit; called after it."""

    def parallel_plan(self) -> dict[str, Placement]:
        """How each own parameter is split over a tensor- or expert-parallel group; every one is named.

        ``column`` splits a matrix (out, in) by its outputs, ``row`` by its inputs, ``expert`` a stack by its first
        dimension, ``replicate`` nothing. Own are the parameters that belong to no block inside this one.
        """
        return {}
