"""How the weights of a decoder grow from a narrower one, and the factors by which training stays the same.

A decoder and its *base* are composed at two widths on the meta device, and every weight is compared with its
counterpart. The maximal update parametrisation (Yang & Hu 2021, arXiv:2011.14522; in the spectral form of Yang, Simon &
Bernstein 2023, arXiv:2310.17813) asks that activations and their changes by a step keep their size. With m_in and m_out
the growth of a weight's input and output side, it follows for a linear map W::

    ‖W‖₂ ~ √(out/in)     initial deviation × min(1, √(m_out/m_in)) / √m_in
    ‖ΔW‖₂ ~ √(out/in)    rate × √(m_out/m_in) · s(base) / s(W),  with s the spectral norm of a step at rate 1

A step of Adam has s = √(in·out), all entries being ±1 and aligned with the input: rate × 1/m_in. The gradient of a
weight falls as 1/m_out, and ε with it. Rows of tables and vectors are not summed over: their factors are 1, except that

* an embedding whose output is multiplied by √d_model starts and moves by 1/√m_out;
* a head tied to it sums over its rows, which must not shrink: the gain of the norm before it does, by 1/m in all;
* where heads become wider, scores of aligned queries and keys need 1/width and the attention has 1/√width: the weights
  of the queries take what is missing.

No factor depends on the names of blocks, so those of plug-ins are included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.base import Block
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.scale import Scale, multiplier
from blockwright.blocks.weights import Weight, weights

GROWS = 1 + 1e-6  # growth of a side that counts as one
Step = Callable[[Weight], float]  # spectral norm of a weight's step at a learning rate of 1, up to a constant


@dataclass(frozen=True)
class Grown:
    """A weight and its counterpart in the base."""

    base: Weight
    weight: Weight

    @property
    def inputs(self) -> float:
        """m_in."""
        return sides(self.weight)[0] / sides(self.base)[0]

    @property
    def outputs(self) -> float:
        """m_out."""
        return sides(self.weight)[1] / sides(self.base)[1]

    def scale(self, step: Step) -> Scale:
        """The factors of its kind, by the growth of its sides alone."""
        m_in, m_out = self.inputs, self.outputs
        if self.weight.kind in ("table", "vector"):
            return Scale(eps=1 / m_out)
        rate = math.sqrt(m_out / m_in) * step(self.base) / step(self.weight)
        return Scale(min(1.0, math.sqrt(m_out / m_in)) / math.sqrt(m_in), rate, 1 / m_out)


def sides(weight: Weight) -> tuple[int, int]:
    """The sizes (in, out) of what a weight reads and writes.

    A linear map is stored (out, in), a stack of them (…, out, in), a filter (out, in a group, places) and a table
    (rows, out).
    """
    shape = weight.parameter.shape
    if weight.kind == "vector":
        return 1, weight.parameter.numel()
    if weight.kind == "filter":
        return math.prod(shape[1:]), shape[0]
    return (shape[0], shape[1]) if weight.kind == "table" else (shape[-1], shape[-2])


def adam_step(weight: Weight) -> float:
    """Spectral norm of a step of Adam at a learning rate of 1, whose entries are ±1: √(in·out)."""
    return math.sqrt(math.prod(sides(weight)))


def grown(base: nn.Module, module: nn.Module) -> dict[str, Grown]:
    """First name → weight, with its counterpart of the same name.

    Raises:
        ValueError: they have other weights, or weights of other dimensions; the message names some
    """
    theirs, ours = ({w.names[0]: w for w in weights(m)} for m in (base, module))
    unlike = theirs.keys() ^ ours.keys() or {n for n in ours if ours[n].parameter.ndim != theirs[n].parameter.ndim}
    if unlike:
        raise ValueError(", ".join(sorted(unlike)[:3]))
    return {name: Grown(theirs[name], weight) for name, weight in ours.items()}


def scales(base: Decoder, decoder: Decoder, step: Step = adam_step) -> dict[str, Scale]:
    """First name → factors of each weight of a decoder.

    Args:
        base: the same composition at other widths
        decoder: both may be on the meta device
        step: of the optimizer

    Raises:
        ValueError: as ``grown``
        NotScaledError: a factor has no weight to be put on
    """
    found = grown(base, decoder)
    factors = {name: each.scale(step) for name, each in found.items()}
    for name, more in [*_of_embedding(base, decoder, found), *_of_queries(base, decoder)]:
        factors[name] = factors[name].times(more)
    return factors


class NotScaledError(ValueError):
    """A factor that the rules need has no weight to be put on; the message says which, ``remedy`` what to change."""

    def __init__(self, rule: str, remedy: str) -> None:
        super().__init__(rule)
        self.remedy = remedy


def _of_embedding(base: Decoder, decoder: Decoder, found: Mapping[str, Grown]) -> Iterator[tuple[str, Scale]]:
    """Further factors of the embedding, and of the final norm before a head that is tied to it."""
    inner = base.embedding_scale / decoder.embedding_scale  # 1/√m if embeddings are multiplied by √d_model
    width = found["embedding.weight"].outputs if "embedding.weight" in found else 1.0
    if "embedding.weight" in found and inner != 1:
        yield "embedding.weight", multiplier(inner)
    if decoder.head is None and width > GROWS:
        gain = decoder.norm._parameters.get("weight")
        if gain is None or gain.ndim != 1 or _draws(decoder.norm):
            rule = "the head is tied to the embedding, and the final norm has no gain that could take its factor 1/m"
            raise NotScaledError(rule, "Write model.tie_embeddings=false, or a final norm with a gain, such as rmsnorm")
        for leaf in decoder.norm._parameters:
            yield f"norm.{leaf}", multiplier(1 / (width * inner))


def _draws(block: Block) -> bool:
    """Whether a block sets its own initial values, which no factor reaches."""
    return type(block).reset_parameters is not Block.reset_parameters


def _of_queries(base: Decoder, decoder: Decoder) -> Iterator[tuple[str, Scale]]:
    """Further factors of the weights of queries, where heads are wider than in the base."""
    theirs = dict(base.named_modules())
    for name, block in decoder.named_modules():
        if isinstance(block, Attention):
            narrow = theirs[name]
            assert isinstance(narrow, Attention)
            yield from ((f"{name}.{leaf}", more) for leaf, more in _of_scores(narrow, block))


def _of_scores(base: Attention, block: Attention) -> Iterator[tuple[str, Scale]]:
    ours, theirs = ({r.name: r.height for r in b.score_rows() if r.side != "key"} for b in (block, base))
    wider = {name: height / theirs[name] for name, height in ours.items() if height != theirs[name]}
    scale, before = (getattr(b, "scale", 1.0) for b in (block, base))
    for name, growth in wider.items():
        yield name, multiplier(before / growth / scale)


def unscaled_scores(base: Decoder, decoder: Decoder) -> list[str]:
    """Names of attentions whose heads are wider than in the base, and whose scores no factor reaches."""
    theirs = dict(base.named_modules())
    return [
        name
        for name, block in decoder.named_modules()
        if isinstance(block, Attention)
        and getattr(block, "scale", None) != getattr(theirs[name], "scale", None)
        and not block.score_rows()
    ]


def multiplied(base: Decoder, decoder: Decoder) -> set[str]:
    """Names of the modules whose output becomes smaller with the width by design: a factor on it has moved there."""
    found = grown(base, decoder)
    names = {name for name, _ in [*_of_embedding(base, decoder, found), *_of_queries(base, decoder)]}
    return {name.rpartition(".")[0] for name in names}


def branches(decoder: Decoder) -> set[str]:
    """Names of the weights whose product is added to the residual stream."""
    blocks = [(name, m) for name, m in decoder.named_modules() if isinstance(m, Block)]
    named = {f"{name}.{output}" for name, block in blocks for output in block.residual_outputs}
    return named & dict(decoder.named_parameters()).keys()
