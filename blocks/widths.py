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
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.base import Attention
from blockwright.blocks.base import Block
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.initialise import Weight, weights
from blockwright.blocks.kernels.long_attention import LargestScores
from blockwright.blocks.layer import Layer
from blockwright.blocks.scale import Scale, multiplier

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
        # Whether a block sets its own initial values, which no factor reaches
        if gain is None or gain.ndim != 1 or (type(decoder.norm).reset_parameters is not Block.reset_parameters):
            rule = "the head is tied to the embedding, and the final norm has no gain that could take its factor 1/m"
            raise NotScaledError(rule, "Write model.tie_embeddings=false, or a final norm with a gain, such as rmsnorm")
        for leaf in decoder.norm._parameters:
            yield f"norm.{leaf}", multiplier(1 / (width * inner))


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


LOGITS = "logits"
SUCCESSORS = 4  # of a token in the text: enough to learn in a few steps, too many to overfit


class Size(NamedTuple):
    """Means over an activation: its absolute value before training, and the absolute change by it."""

    initial: float
    change: float


class Slope(NamedTuple):
    """Slopes of log size against log width."""

    initial: float
    change: float


def text(rows: int, length: int, vocabulary: int, seed: int) -> Tensor:
    """[B,T+1] tokens by Zipf's law of which each has a few successors, as in text: drawn, so that no data is needed."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float32)
    drawn = torch.multinomial(frequency, vocabulary * SUCCESSORS + rows, replacement=True, generator=generator)
    successors = drawn[rows:].view(vocabulary, SUCCESSORS)
    choices = torch.randint(SUCCESSORS, (length, rows), generator=generator)
    tokens = [drawn[:rows]]
    for choice in choices:
        tokens.append(successors[tokens[-1], choice])
    return torch.stack(tokens, 1)


def measure(decoder: Decoder, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int) -> dict[str, Size]:
    """Train a decoder on one batch, and compare its activations on it before and after.

    Args:
        decoder: trained in place
        optimizer: of its weights
        tokens: [B,T+1]
        steps: of the optimizer

    Returns:
        kind of activation → its size; ``layers.*.attention.query`` is the mean over the layers
    """
    before = activations(decoder, tokens[:, :-1])
    for _ in range(steps):
        loss = F.cross_entropy(decoder(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = activations(decoder, tokens[:, :-1])
    sizes: dict[str, list[Size]] = {}
    for name, start in before.items():
        size = Size(start.abs().mean().item(), (after[name] - start).abs().mean().item())
        sizes.setdefault(kind_of(name), []).append(size)
    return {kind: Size(*(sum(column) / len(column) for column in zip(*of, strict=True))) for kind, of in sizes.items()}


def kind_of(name: str) -> str:
    """The name of an activation without the number of its layer."""
    return re.sub(r"^(layers|mtp)\.\d+", r"\1.*", name)


def activations(decoder: Decoder, tokens: Tensor) -> dict[str, Tensor]:
    """Name of a linear layer, embedding, block or layer → what it returns for tokens [B,T]; the largest attention score
    of each head, and the logits."""
    attentions = {name: m for name, m in decoder.named_modules() if isinstance(m, Attention) and m.score_rows()}
    scores = {f"{name}.scores": LargestScores(attention) for name, attention in attentions.items()}
    with _recorded(decoder) as found:
        logits = decoder(tokens).detach().float()  # with a graph: scores are noted in such passes only
    decoder.choose_kernels()
    noted = {name: largest.take() for name, largest in scores.items()}
    return {**found, **{name: each for name, each in noted.items() if each is not None}, LOGITS: logits}


@contextmanager
def _recorded(decoder: Decoder) -> Iterator[dict[str, Tensor]]:
    found: dict[str, Tensor] = {}

    def record(name: str, got: Any) -> None:
        got = got[0] if isinstance(got, tuple) else got
        if isinstance(got, Tensor) and got.is_floating_point():
            found[name] = got.detach().float().clone()

    handles = [
        module.register_forward_hook(lambda _module, _given, got, name=name: record(name, got))
        for name, module in decoder.named_modules()
        if name and name != "head" and isinstance(module, nn.Linear | nn.Embedding | Block | Layer)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def slopes(widths: Sequence[int], measured: Sequence[Mapping[str, Size]]) -> dict[str, Slope]:
    """Kind of activation → slopes over the widths; kinds that stay at 0 are left out.

    Args:
        widths: of the decoders
        measured: the sizes at each, in the same order; several of one width are averaged
    """
    found = {}
    for kind in measured[0]:
        sizes = [one[kind] for one in measured]
        if all(size.initial > 0 and size.change > 0 for size in sizes):
            columns = zip(*sizes, strict=True)
            found[kind] = Slope(*(_slope(widths, column) for column in columns))
    return found


def _slope(widths: Sequence[int], sizes: Sequence[float]) -> float:
    """The least-squares slope of log mean size against log width."""
    means = {w: sum(s for v, s in zip(widths, sizes, strict=True) if v == w) / widths.count(w) for w in set(widths)}
    x, y = [math.log(w) for w in means], [math.log(size) for size in means.values()]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / sum((a - x_mean) ** 2 for a in x)
