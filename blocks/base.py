"""The interface of every block.

Shape legend of all docstrings here: B batch, T time, S keys, D model width, N query heads, K KV heads, H head width,
R rotated width, C latent width, E experts, k experts per token, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import nn

from blockwright.blocks.drawn import Drawn
from blockwright.blocks.kernels.choice import Kernels
from blockwright.registry import Composable

Placement = Literal["column", "row", "expert", "replicate"]
Kind = Literal["matrix", "filter", "table", "vector"]  # of weights; blocks/weights.py says what each is


class Block(nn.Module, Composable):
    """Base class of every contract: an ``nn.Module`` that describes itself as data.

    Class attributes:
        residual_outputs: qualified names of the parameters whose product is added to the residual stream; depth-scaled
            initialisation shrinks exactly these
        causal: whether a token's output is independent of later tokens; False for gates that choose over the whole
            batch
        independent: whether in evaluation a row's output depends on that row alone
        counted_as: the line of a cost card that its parameters belong to; None: that of the block around it
        decides: its method that chooses by scores, where the smallest change may choose otherwise; None: it has none.
            Where activations are recomputed it is called in the forward pass alone, and what it returned is stored with
            what its gradient needs: it should be given scores, not states
        weight_kinds: own parameter of two dimensions and more → what kind of weight it is (blocks/weights.py), which
            dimensions do not show. Whether it decays and whether an optimizer may orthogonalise it follow. Every module
            with such a parameter declares it, except torch's own; those with ``bias`` in their names are vectors
        empty: whether it leaves its slot empty: its output is 0, and no gradient comes through it
        flops_within: share by which the FLOPs counted of a training step may differ from those that run, where what it
            computes in training is not counted, with the reason; None: 0.5 %
        conformance_settings: parameter values for its conformance checks, small, and such that every parameter has an
            effect
        conformance_model: keys of the model that its checks compose, beside it: ``overrides`` by which another layer
            leaves what it reads

    Attributes:
        kernels: the kernel implementations it uses; set by the decoder that contains it
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = True
    independent: ClassVar[bool] = True
    counted_as: ClassVar[str | None] = None
    decides: ClassVar[str | None] = None
    weight_kinds: ClassVar[Mapping[str, Kind]] = {}
    empty: ClassVar[bool] = False
    flops_within: ClassVar[float | None] = None
    conformance_settings: ClassVar[Mapping[str, Any]] = {}
    conformance_model: ClassVar[Mapping[str, Any]] = {}
    kernels: Kernels = Kernels()

    def drawn(self) -> Drawn:
        """What a drawing of the model says of the block; by default its parameters, as its signature names them."""
        return Drawn()

    def reset_parameters(self) -> None:
        """Set own parameters and buffers where the decoder's initialisation rule does not fit; called after it."""

    def parallel_plan(self) -> dict[str, Placement]:
        """How own parameters are split over a tensor- or expert-parallel group; one that is not named is replicated.

        ``column`` splits a matrix (out, in) by its outputs, ``row`` by its inputs, ``expert`` a stack by its first
        dimension, ``replicate`` nothing. Own parameters are those that belong to no block inside this one.
        """
        return {}
