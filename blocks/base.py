"""The interface of every block.

Shape legend of all docstrings here: B batch, T time, S keys, D model width, N query heads, K KV heads, H head width,
R rotated width, C latent width, E experts, k experts per token, F hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from blockwright.blocks.kernels.choice import Kernels
from blockwright.registry import Composable

Placement = Literal["column", "row", "expert", "replicate"]
Kind = Literal["matrix", "filter", "table", "vector"]  # of weights; blocks/initialise.py says what each is


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
        weight_kinds: own parameter of two dimensions and more → what kind of weight it is (blocks/initialise.py), which
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

    def head_rows(self) -> Mapping[str, tuple[int, ...]]:
        """Own matrices (out, in) whose outputs are those of heads, one after another → rows of a head.

        Where a head has several maps in one matrix, as of keys and values, the rows of each: they begin again with each
        head. An optimizer may treat each as a matrix of its own.
        """
        return {}


# --- what a picture says of a block, beyond its signature and its children (lab/drawing) ------------------------------


class Drawn(NamedTuple):
    """The drawing of a block. All that is left out follows from its signature.

    lines: its label, a few words each, with numbers of the block that was built; None: its parameters, as in YAML
    acts: what it acts on in the block around it, such as ``queries, keys``, ``scores`` or ``output``: a child that acts
        on one of ``ORDER`` is drawn in that order. "": its parameter says so
    hides: parameters that the label leaves out
    shows: parameters that the label has, default or not
    chosen: of how many equal parts a token uses how many: (6, 160)
    """

    lines: tuple[str, ...] | None = None
    acts: str = ""
    hides: tuple[str, ...] = ()
    shows: tuple[str, ...] = ()
    chosen: tuple[int, int] | None = None


# What children act on, in the order in which an attention computes; any other is drawn before them.
ORDER = ("queries", "keys", "values", "queries, keys", "state", "keys seen", "scores", "output", "training")


def number(value: int) -> str:
    """A width or a count in a label: 12,288."""
    return f"{value:,}"


# --- what children of an attention read of its tokens, and have its cache hold of each --------------------------------


class Queries(NamedTuple):
    """The T tokens that attend.

    x: [B,T,D], the attention's input
    q: [B,T,N,H], its queries, rotated
    positions: [B|1,T]
    """

    x: Tensor
    q: Tensor
    positions: Tensor

    def rows(self, rows: slice) -> Queries:
        """Some of the tokens."""
        return Queries(*(t[:, rows] for t in self))


class Keys(NamedTuple):
    """The S tokens that are attended to, those that attend included.

    positions: [B|1,S], of each in its document
    order: [S], by which they are sorted in time; the last T are those that attend. A ring gives keys as it stores them
    noted: [B,S,…] for each of the child's ``slots``
    """

    positions: Tensor
    order: Tensor
    noted: tuple[Tensor, ...] = ()


class Remembering(Block):
    """A child of attention that may have something remembered of each token, next to the attention's own.

    What it notes is cached, quantised, rewound, moved and sent as keys and values are.
    """

    def slots(self) -> dict[str, tuple[int, ...]]:
        """What it has cached of each token: name → shape."""
        return {}

    def remember(self, x: Tensor, positions: Tensor, declared: int | Tensor) -> tuple[Tensor, ...]:
        """Values [B,T,…] for each slot.

        Args:
            x: [B,T,D], the attention's input
            positions: [B|1,T]
            declared: tokens that the sequences are declared to have, or [B] each, for ``Position.rotate_in``
        """
        return ()

    def neutral(self) -> dict[str, Tensor] | None:
        """Values of some of its parameters with which an attention computes what it does without it, or with its
        ``inner`` alone: a trained model may begin there. None, the default, where there are none to learn from."""
        return None
