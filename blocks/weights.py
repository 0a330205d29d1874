"""The trainable weights of a model, and what kind of weight each is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.conv import _ConvNd

from blockwright.blocks.base import Block, Kind
from blockwright.blocks.memory import Table


@dataclass(frozen=True)
class Weight:
    """One trainable parameter.

    Args:
        names: all its qualified names; several if modules share it (a tied head)
        parameter: the tensor
        kind: `matrix`, of a linear map or a stack of them `(E, a, b)`; `filter`, of a convolution;
            `table`, indexed by row, not multiplied (token embeddings, learned positions);
            `vector`, everything else: norm weights, biases, scalars, and what begins as the identity, of which decay
            would take away what it passes on. A module says so in `weight_kinds`
        sparse: whether its gradient holds only the rows that a batch reads
        head_rows: rows of a head, of each map that it has, where its outputs are those of heads (``Block.head_rows``)
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    kind: Kind
    sparse: bool = False
    head_rows: tuple[int, ...] = ()

    @property
    def decays(self) -> bool:
        """Whether weight decay applies to it: to what multiplies activations, where smaller means smoother.

        Decay of a norm weight or bias pulls activations towards zero instead, and a decayed row of a table shrinks in
        every step in which its token does not occur.
        """
        return self.kind in ("matrix", "filter")


def weights(module: nn.Module) -> list[Weight]:
    """Every trainable parameter of `module`, each once, in the order of registration.

    A parameter shared by an embedding and a head counts as the embedding's, because of the rows of rare tokens.
    """
    found: dict[nn.Parameter, list[tuple[str, Kind]]] = {}
    sparse: set[nn.Parameter] = set()
    heads = _head_rows(module)
    for name, owner, parameter in _places(module):
        if parameter.requires_grad:
            found.setdefault(parameter, []).append((name, _kind(name, owner, parameter)))
            sparse |= {parameter} if isinstance(owner, Table) else set()
    return [
        Weight(
            tuple(name for name, _ in places),
            parameter,
            _strictest(k for _, k in places),
            parameter in sparse,
            next((heads[name] for name, _ in places if name in heads), ()),
        )
        for parameter, places in found.items()
    ]


def _head_rows(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Qualified names of the matrices of heads → rows of a head."""
    blocks = {f"{path}." if path else "": m for path, m in module.named_modules() if isinstance(m, Block)}
    return {f"{path}{leaf}": rows for path, block in blocks.items() for leaf, rows in block.head_rows().items()}


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """(qualified name, owning module, parameter), once for every registration of a parameter."""
    for path, owner in module.named_modules(remove_duplicate=False):
        for leaf, parameter in owner.named_parameters(prefix=path, recurse=False, remove_duplicate=False):
            yield leaf, owner, parameter


def _kind(name: str, owner: nn.Module, parameter: nn.Parameter) -> Kind:
    *path, leaf = name.split(".")
    if (declared := getattr(owner, "weight_kinds", {}).get(leaf)) is not None:
        return declared
    # A position block has rows per position or per distance; only a Linear inside it is a map.
    if isinstance(owner, nn.Embedding | nn.EmbeddingBag) or ("position" in path and not isinstance(owner, nn.Linear)):
        return "table"
    # Dimensions alone would classify the biases of E experts, (E, F), and norms per head, (N, H), as maps.
    if parameter.ndim < 2 or "bias" in leaf or type(owner).__name__.lower().endswith("norm"):
        return "vector"
    return "filter" if isinstance(owner, _ConvNd) else "matrix"


def _strictest(kinds: Iterator[Kind]) -> Kind:
    """Of several kinds of one shared parameter, the most restrictive."""
    order: tuple[Kind, ...] = ("table", "vector", "filter", "matrix")
    return min(kinds, key=order.index)
