"""The contract of ``memory``: what a layer looks up by the ids of its tokens, one at a time or by n-grams."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.base import Block
from blockwright.blocks.cache.base import Cache
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.depthwise import CausalConv
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.registry import BlockError, family, register
from blockwright.registry.ranges import Count, Positive, Taps, Whole


@family("memory", context=("vocab_size", "n_streams"))
class Memory(Block):
    """An optional part of a layer, which reads ``given.tokens`` and is added to the residual stream.

    Its rows are in a ``Table``: then gradients are sparse, optimizers step only the rows that were read, sharding never
    gathers them, and a cost card counts of them what a token reads. Its constructor may take ``vocab_size``, and
    ``n_streams``, M, the residual streams of the model.

    Class attributes:
        place: whether it is added before the attention, or after the feed-forward block
        silent: qualified names of parameters with which, at 0, it adds nothing, and still learns: so it is put into a
            trained model

    Attributes:
        reach: how many tokens before a token its output depends on, beside what x holds of them. One with a reach has
            ``new_cache``. None: all of them; such a memory cannot be spread over ranks that share sequences
    """

    counted_as: ClassVar[str | None] = "memory"
    place: ClassVar[Literal["before", "after"]] = "before"
    silent: ClassVar[tuple[str, ...]] = ()
    reach: int | None = 0

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        """What is added to the stream.

        Args:
            x: [B,T,D] of the residual stream, not normalised, or [B,T,M,D] of several
            given: its ``cache`` is that of ``new_cache``, ``embedded`` the input of the first layer, [B,T,D]

        Returns:
            the shape of x
        """
        raise NotImplementedError

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Cache:
        """An empty cache of what it needs of the tokens before; a memory without reach needs none."""
        raise NotImplementedError

    def ids(self, given: Pass) -> Tensor:
        """[B,T] ids of the tokens.

        Raises:
            BlockError: the caller gives none
        """
        if given.tokens is None:
            rule = "reads the ids of the tokens, which this caller does not pass"
            raise BlockError("memory", type(self).__name__, rule, "Call the layer with tokens, as the decoder does")
        return given.tokens


# --- a table of which a token reads a few rows ---


def numbers(gradient: Tensor) -> Tensor:
    """The numbers of a gradient, perhaps a sparse one: its own storage, if it is coalesced."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


class Table(nn.Embedding):
    """``torch.nn.Embedding`` with sparse gradients: ids [...] → rows [...,W].

    A gradient holds the rows that a batch read, once each, and optimizers step these alone
    (training/optimizers/row_adam.py). Sharding spreads the rows over ranks, which exchange what their tokens read
    (training/parallel/splits.py). A class of its own, since all of these find tables by it.

    Args:
        rows: V
        width: W, numbers of a row

    Raises:
        BlockError: no tensor can hold them
    """

    def __init__(self, rows: int, width: int) -> None:
        try:
            # With a weight there is no random draw, for which torch on the meta device imports its compiler.
            super().__init__(rows, width, sparse=True, _weight=torch.empty(rows, width, dtype=torch.float32))
        except (RuntimeError, TypeError):  # sizes beyond the address space
            rule = f"no tensor can hold so many rows of {width} numbers"
            raise BlockError("rows", rows, rule, "Choose fewer rows") from None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@register("memory", "per_layer_embedding")
class PerLayerEmbedding(Memory):
    """A narrow embedding of each token for each layer, which gates a bottleneck behind the feed-forward block.

    Gemma 3n and Gemma 4 (the E models; there is no paper). With a token's row E of this layer's table [V,P] and the
    input x₀ of the first layer: p = (√P · E + norm(W_p x₀/√D))/√2; x ← x + norm(W_o (gelu(W_g x) ⊙ p)).

    How this differs: Gemma stores the tables and W_p of all layers side by side, and has one norm of W_p x₀ for all
    layers. Of several streams each is read and written alone; Gemma 3n reads one and corrects the others.

    Args:
        embedded_norm: of W_p x₀
        output_norm: of what is added
        width: P, numbers of a row; 256 in Gemma
    """

    place: ClassVar[Literal["before", "after"]] = "after"
    silent: ClassVar[tuple[str, ...]] = ("output_norm.weight",)  # the norm's slope at 0 is 1/√ε
    conformance_settings: ClassVar[Mapping[str, Any]] = {"width": 10}
    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

    def __init__(
        self, d_model: int, vocab_size: int, embedded_norm: Norm, output_norm: Norm, width: Count = 256
    ) -> None:
        super().__init__()
        self.table = Table(vocab_size, width)
        self.project, self.gate = (Linear(d_model, width, bias=False) for _ in range(2))
        self.output = Linear(width, d_model, bias=False)
        self.embedded_norm, self.output_norm = embedded_norm, output_norm

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"] if child == "output_norm" else known["width"]}

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        if given.embedded is None:
            rule = "reads the input of the first layer, which this caller does not pass"
            raise BlockError("memory", "per_layer_embedding", rule, "Give Pass(embedded=…), as the decoder does")
        context = self.embedded_norm(self.project(given.embedded) * x.shape[-1] ** -0.5)
        rows = self.table(self.ids(given))
        p = (context + rows * rows.shape[-1] ** 0.5) * 2**-0.5
        p = p if x.ndim == 3 else p[:, :, None]
        return self.output_norm(self.output(F.gelu(self.gate(x), approximate="tanh") * p))


# --- hashes of the last few tokens: multiplicative, one prime for each table (Engram, arXiv 2601.07372) ---


MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15  # of SplitMix64
LAYER_STEP = 10007  # between the seeds of two layers, as transformers' qwen4_exp has it
WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)  # decide primality below 3.3e24


def last_tokens(history: Tensor, segments: Tensor | None, n: int, end: int | None) -> list[Tensor]:
    """Each token and the n − 1 before it in its document: for each lag 0 … n − 1 the id, [B,T], −1 for none.

    Args:
        history: [B,n−1+T], 1 + the ids of the tokens and of the n − 1 before them; 0 for none
        segments: [B,T] document ids; the tokens before are of none
        n: longest n-gram
        end: id of the token that ends a document; None: only segments separate documents
    """
    past, T = n - 1, history.shape[1] - n + 1
    lagged, inside = [history[:, past:] - 1], torch.ones_like(history[:, past:], dtype=torch.bool)
    for lag in range(1, n):
        earlier = history[:, past - lag : past - lag + T]
        inside = inside & (earlier != 0)
        if end is not None:
            inside = inside & (earlier != end + 1)
        if segments is not None and lag < T:
            same = segments[:, lag:] == segments[:, :-lag]
            inside = inside & torch.cat((same.new_ones(len(same), lag), same), 1)
        lagged.append(torch.where(inside, earlier - 1, -1))
    return lagged


def rows_of_ngrams(lagged: Sequence[Tensor], multipliers: Sequence[int], primes: Sequence[int], filler: int) -> Tensor:
    """Rows of the tables of all n-grams of orders 2 … n, [B,T,tables]; the tables are stored one behind the other.

    An n-gram of ids v₀ (the last) … v_{n−1} has the hash m₀v₀ xor … xor m_{n−1}v_{n−1}, and in a table of p rows the
    row of that modulo p.

    Args:
        lagged: of each lag the ids [B,T], −1 for none
        multipliers: m, one for each lag
        primes: rows of the tables: first those of 2-grams, as many for each order
        filler: the id that stands for none
    """
    a_order = len(primes) // (len(lagged) - 1)
    first, *terms = (torch.where(ids < 0, filler, ids) * m for ids, m in zip(lagged, multipliers, strict=True))
    mixed, offset = first, 0
    rows: list[Tensor] = []
    for order, term in enumerate(terms):
        mixed = mixed ^ term
        for prime in primes[order * a_order : (order + 1) * a_order]:
            rows.append(mixed % prime + offset)
            offset += prime
    return torch.stack(rows, -1)


def multipliers(vocab_size: int, n: int, seed: int) -> tuple[int, ...]:
    """n odd numbers by which ids are multiplied without overflow, drawn by SplitMix64."""
    half = max(1, (2**63 - 1) // vocab_size // 2)
    return tuple(2 * (_split_mix(seed + GAMMA * (i + 1)) % half) + 1 for i in range(n))


def _split_mix(value: int) -> int:
    value = (value + GAMMA) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


@functools.lru_cache(maxsize=256)
def primes_from(least: int, skipped: int, count: int) -> tuple[int, ...]:
    """``count`` consecutive primes of at least ``least``, after the first ``skipped`` ones."""
    found = _primes(least)
    for _ in range(skipped):
        next(found)
    return tuple(next(found) for _ in range(count))


def _primes(least: int) -> Iterator[int]:
    number = max(2, least)
    while True:
        if _is_prime(number):
            yield number
        number += 1


def _is_prime(number: int) -> bool:
    """Miller–Rabin with witnesses that decide all numbers of 64 bits."""
    if number in WITNESSES or any(number % p == 0 for p in WITNESSES):
        return number in WITNESSES
    twos = ((number - 1) & -(number - 1)).bit_length() - 1
    return all(_passes(pow(a, (number - 1) >> twos, number), number, twos) for a in WITNESSES)


def _passes(power: int, number: int, twos: int) -> bool:
    if power in (1, number - 1):
        return True
    return any((power := power * power % number) == number - 1 for _ in range(twos - 1))


LEAST_GATE = 1e-6  # under the root, whose slope at 0 has no bound


@register("memory", "engram")
class Engram(Memory):
    """Rows of the last tokens' n-grams, looked up by hash, gated by the state, and smoothed over a few tokens.

    DeepSeek 2026 (Engram), arXiv 2601.07372; Qwen4-Exp. With e of a token, the concatenated rows of its n-grams of
    orders 2 … n, in tables of distinct primes of rows, and x its stream: v = W_v e, k = W_k e,
    g = σ(sign(s) √|s|), s = ⟨norm(k), norm(x)⟩/√D; u = g v; y = u + silu(conv(u/√(mean u² + ε))), with a causal
    depthwise convolution whose taps are n tokens apart and begin at 0. Of several streams each has keys, gates and a
    convolution of its own; rows and values are shared. No n-gram crosses documents.

    What a token needs of those before it, n − 1 ids and inputs of the convolution, is in the cache, whatever the
    length. A table has a prime number of rows, ``rows`` or more, another for each head and each layer.

    DeepSeek-V4.1 has no convolution: y = u (``taps: null``), and n is 4.

    How this differs: the paper and DeepSeek-V4.1 first map ids to those of normalised text (NFKC, lower case), which
    Qwen4-Exp leaves out. V4.1 draws the multipliers of its hashes by numpy's generator. The gain of the convolution's
    norm is a factor of its weights, and is no parameter. Qwen4-Exp pads the tables together to a multiple of 128 rows.

    Args:
        key_norm: of the keys; one copy for each stream
        query_norm: of the stream; one copy for each stream
        rows: least number of rows of a table; 20,000,000 in Qwen4-Exp
        width: numbers of e, the rows of all tables together; null is d_model
        n_heads: tables for each order, all with hashes of their own
        ngram: n, the longest order
        taps: of the convolution, the token itself included; null for none
        end: id of the token that ends documents: n-grams that would cross one have it in place of the tokens before.
            null: documents are separate only where they are packed
        seed: of the hashes
        ordinal: number of this memory among those of the model, on which its primes and its hashes depend; null is the
            index of its layer
        eps: ε, added under the root of the mean square
    """

    silent: ClassVar[tuple[str, ...]] = ("value.weight",)
    residual_outputs: ClassVar[tuple[str, ...]] = ("value.weight",)
    conformance_settings: ClassVar[Mapping[str, Any]] = {"rows": 37, "n_heads": 2, "end": 3}

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        n_streams: int,
        layer_idx: int,
        key_norm: Norm,
        query_norm: Norm,
        rows: Annotated[int, Ge(2), Le(2**40)],
        width: Count | None = None,
        n_heads: Count = 8,
        ngram: Annotated[int, Ge(2), Le(16)] = 3,
        taps: Taps | None = 4,
        end: Whole | None = None,
        seed: Whole = 0,
        ordinal: Annotated[int, Ge(0), Lt(10_000)] | None = None,
        eps: Positive = 1e-6,
    ) -> None:
        super().__init__()
        width, place = width or d_model, layer_idx if ordinal is None else ordinal
        n_tables = n_heads * (ngram - 1)
        _check(width, n_tables, end, vocab_size)
        self.ngram, self.end, self.eps = ngram, end, eps
        self.filler = vocab_size if end is None else end
        self.multipliers = multipliers(vocab_size, ngram, seed + LAYER_STEP * place)
        self.primes = primes_from(rows, place * n_tables, n_tables)
        self.reach = ngram - 1 + (0 if taps is None else (taps - 1) * ngram)
        self.table = Table(sum(self.primes), width // n_tables)
        self.key, self.value = Linear(width, n_streams * d_model, bias=False), Linear(width, d_model, bias=False)
        self.key_norms = nn.ModuleList(copy.deepcopy(key_norm) for _ in range(n_streams))
        self.query_norms = nn.ModuleList(copy.deepcopy(query_norm) for _ in range(n_streams))
        self.smooth = None if taps is None else Smoothing(n_streams * d_model, taps, ngram)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["d_model"]}

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        held = given.cache if isinstance(given.cache, State) else None
        e, history = self._recall(given, held)
        streams = x if x.ndim == 4 else x[:, :, None]
        # g [B,T,M,1] of e [B,T,width] and streams [B,T,M,D]
        keys = self.key(e).unflatten(-1, streams.shape[2:]).unbind(2)
        k = torch.stack([norm(key) for norm, key in zip(self.key_norms, keys, strict=True)], 2)
        q = torch.stack([norm(stream) for norm, stream in zip(self.query_norms, streams.unbind(2), strict=True)], 2)
        s = (k * q).sum(-1, keepdim=True) / streams.shape[-1] ** 0.5
        gate = (s.abs().clamp_min(LEAST_GATE).sqrt() * s.sign()).sigmoid()
        u = gate * self.value(e)[:, :, None]
        left = {"ids": history}
        if self.smooth is not None:
            normed = F.rms_norm(u, u.shape[-1:], None, self.eps).flatten(2)
            normed = normed if held is None else held.without_padding(normed)
            y, left["inputs"] = self.smooth(normed, given.segments, None if held is None else held.held["inputs"])
            u = u + F.silu(y).view_as(u)
        if held is not None:
            held.advance(x.shape[1], {name: held.tails(name, tail) for name, tail in left.items()})
        return u.view_as(x)

    def _recall(self, given: Pass, held: State | None) -> tuple[Tensor, Tensor]:
        """e [B,T,width] of each token, and 1 + the ids of the tokens and of those before, 0 for none."""
        new = self.ids(given) + 1
        before = new.new_zeros(len(new), self.ngram - 1) if held is None else held.held["ids"]
        history = torch.cat((before, new if held is None else held.without_padding(new)), 1)
        lagged = last_tokens(history, given.segments, self.ngram, self.end)
        return self.table(rows_of_ngrams(lagged, self.multipliers, self.primes, self.filler)).flatten(-2), history

    def new_cache(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> State:
        tails: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"ids": ((self.ngram - 1,), torch.int64)}
        if self.smooth is not None:
            channels, taps = self.smooth.weight.shape
            tails["inputs"] = ((taps - 1) * self.ngram, channels), dtype
        return State(batch, length, tails, device)


class Smoothing(CausalConv, Block):
    """A convolution that begins at 0."""

    def __init__(self, channels: int, taps: int, dilation: int) -> None:
        super().__init__(channels, taps, dilation=dilation)

    def reset_parameters(self) -> None:
        self.weight.zero_()


def _check(width: int, n_tables: int, end: int | None, vocab_size: int) -> None:
    if width % n_tables:
        rule = f"is divided evenly among {n_tables} tables: n_heads for each of the ngram − 1 orders"
        raise BlockError("width", width, rule, f"Write {max(1, round(width / n_tables)) * n_tables}, or other heads")
    if end is not None and end >= vocab_size:
        raise BlockError("end", end, f"is an id of one of the {vocab_size} tokens", "Write the id of the end token")
