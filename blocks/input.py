"""The contract of an input: what a decoder reads among its tokens beside text, such as sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.registry import BlockError
from blockwright.registry.catalogue import find_family

Media = Mapping[str, Any]  # kind of an input → its content of a batch, which that input alone reads


class Input(Block):
    """Embeds content of one kind, and puts the embeddings at the places of a token of the text.

    A kind of block whose contract derives from this class is an input of every model that names it: with
    ``@family("sound", in_layers=False)`` on the contract, ``model.sound`` gives the decoder a part ``sound``. A decoder
    may have several inputs, each with a token of its own. In a batch, the tensors of an input have the keys
    ``KIND.PART``: ``sound.samples``.

    Attributes:
        token: id of the token whose places the embeddings take, one place for each embedding
    """

    token: int

    @property
    def stack(self) -> Sequence[nn.Module]:
        """Its layers, if it has a stack of them: they are sharded and recomputed one by one."""
        return ()

    @property
    def stack_width(self) -> int:
        """Width of what the layers of the stack read."""
        raise NotImplementedError

    def read(self, parts: Mapping[str, Tensor]) -> Any:
        """The content of a batch.

        Args:
            parts: the batch's tensors of this input, without the kind in their keys
        """
        raise NotImplementedError

    def forward(self, content: Any) -> Tensor:
        """Content → embeddings [Σ,D], of all its places in order: row by row, left to right."""
        raise NotImplementedError

    def count(self, content: Any) -> int:
        """Number of its embeddings, without computing them."""
        raise NotImplementedError

    def place(self, x: Tensor, tokens: Tensor, content: Any) -> Tensor:
        """Embeddings x [B,T,D] of tokens [B,T], with those of the content at the places of ``token``.

        Raises:
            BlockError: there are more or fewer places than embeddings. On an accelerator an assertion fails instead, so
                that the host does not wait
        """
        embedded, places = self(content), tokens == self.token
        if tokens.is_cpu and not torch.compiler.is_compiling():
            if (n_places := int(places.sum())) != len(embedded):
                raise self.misplaced(n_places, len(embedded), content)
        else:
            torch._assert_async(places.sum() == len(embedded), "a text needs a place for each embedding in it")
        return x.masked_scatter(places[..., None], embedded.to(x.dtype))

    def misplaced(self, n_places: int, n_embeddings: int, content: Any) -> BlockError:
        """The error of a text with more or fewer places than embeddings."""
        rule = f"the text has {n_places} places of token {self.token}, and {n_embeddings} embeddings to take them"
        return BlockError("tokens", n_places, rule, "Repeat the token once for each embedding")

    def cost_examples(self) -> Mapping[str, tuple[Any, Mapping[str, int]]]:
        """Name → content whose cost a card shows, on the device of the weights, and further numbers that describe it.

        Empty by default: the card shows parameters alone.
        """
        return {}

    def conformance_content(self, rows: int, device: torch.device) -> Any:
        """Random content of equal rows for conformance checks, the same in every call and with an effect on each
        parameter."""
        raise NotImplementedError


def is_input(kind: str) -> bool:
    """Whether the blocks of a kind are inputs of a model."""
    return issubclass(find_family(kind).contract, Input)
