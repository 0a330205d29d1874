"""Weight initialisation, independent of world size and of the other blocks; and what kind of weight each is.

Tensors of two dimensions and more ~ N(0, std²): matrices, embeddings, expert stacks (DeepSeek's papers: std 0.006;
the released Hugging Face configurations: 0.02). With ``depth_scaled``, those that write into the residual stream
get std/√(2·n_layers), as in GPT-2. One-dimensional tensors: biases 0, all others (gains) 1. Buffers: 0. Then
``Block.reset_parameters`` may override this. Adapters have a deviation of their own (blocks/linear.py).

Every tensor has its own generator, seeded by the run's seed and the tensor's name. Swapping one block therefore leaves
every other weight bit-identical: an ablation compares blocks, not random draws.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from blockwright.blocks.base import Block, Kind
from blockwright.blocks.linear import initial_std
from blockwright.blocks.memory import Table
from blockwright.blocks.scale import ONE, Scale

UNSCALED: Mapping[str, Scale] = MappingProxyType({})


class Draw(NamedTuple):
    """A normally distributed parameter, its standard deviation, and the seed of its generator."""

    parameter: nn.Parameter
    std: float
    seed: int


@torch.no_grad()
def initialise(
    model: nn.Module,
    *,
    std: float,
    depth_scaled: bool,
    n_layers: int,
    seed: int,
    prefix: str = "",
    scales: Mapping[str, Scale] = UNSCALED,
) -> None:
    """Initialise every parameter and buffer of ``model``, except those still on the meta device.

    Args:
        model: a module
        std: standard deviation of the normal draws
        depth_scaled: whether weights that write into the residual stream are scaled by 1/√(2·n_layers)
        n_layers: depth of the decoder
        seed: of the run
        prefix: of the names in ``model`` where it is a part of a decoder: ``layers.3.``
        scales: name in the decoder → factors of its parametrisation, of which ``init`` multiplies what the rule gives
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else scales.get(prefix + name, ONE).init)
    where = {"n_layers": n_layers, "seed": seed, "prefix": prefix, "scales": scales}
    for draw in draws(model, std=std, depth_scaled=depth_scaled, **where):  # type: ignore[arg-type]
        if not draw.parameter.is_meta:
            _draw(*draw)
    for buffer in model.buffers():
        buffer.zero_()
    for name, block in _blocks(model):
        if type(block).reset_parameters is not Block.reset_parameters:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(stable_seed(seed, (prefix + name).rstrip(".")))
                block.reset_parameters()


def draws(
    model: nn.Module,
    *,
    std: float,
    depth_scaled: bool,
    n_layers: int,
    seed: int,
    prefix: str = "",
    scales: Mapping[str, Scale] = UNSCALED,
) -> Iterator[Draw]:
    """The draws of the rule; arguments as in ``initialise``."""
    outputs = {f"{name}.{output}".lstrip(".") for name, block in _blocks(model) for output in block.residual_outputs}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            shrink = math.sqrt(2 * n_layers) if depth_scaled and name in outputs else 1.0
            own = initial_std(name, parameter)
            deviation = std / shrink if own is None else own
            factor = scales.get(prefix + name, ONE).init
            yield Draw(parameter, deviation * factor, stable_seed(seed, prefix + name))


@torch.no_grad()
def initialise_added(
    model: nn.Module, known: Collection[nn.Parameter], *, std: float, depth_scaled: bool, n_layers: int, seed: int
) -> None:
    """Initialise the parameters of a decoder that are not among the known; other arguments as in ``initialise``."""
    before = {id(parameter) for parameter in known}
    for name, parameter in model.named_parameters():
        if id(parameter) not in before and parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    for draw in draws(model, std=std, depth_scaled=depth_scaled, n_layers=n_layers, seed=seed):
        if id(draw.parameter) not in before:
            _draw(*draw)


def suited(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the rule draws and no block sets afterwards."""
    left: set[nn.Parameter] = set()
    for _, block in _blocks(model):
        if type(block).reset_parameters is not Block.reset_parameters:
            left |= set(block.parameters())
    return [p for p in model.parameters() if p.ndim >= 2 and p not in left]


def _blocks(model: nn.Module) -> list[tuple[str, Block]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, Block)]


def stable_seed(seed: int, name: str) -> int:
    """A seed for ``name``, the same in every process and version of Python."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest(), "big")


def _draw(parameter: Tensor, std: float, seed: int) -> None:
    """Draw on the CPU in fp32, so that every device and precision starts from the same numbers."""
    in_place = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    drawn = parameter if in_place else torch.empty(parameter.shape, dtype=torch.float32)
    drawn.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))
    if not in_place:
        parameter.copy_(drawn)


# --- a part of a tensor's numbers, without the rest -------------------------------------------------------------------


BLOCK = 16  # numbers converted together by torch
_N, _M, _TWIST = 624, 397, 0x9908B0DF  # of MT19937, as _DEGREE = 32 · 624 − 31 is
_DEGREE = 19937
_HEAD = 24  # bytes of a generator's state before its words: seed, places
_CHUNK = 2**22  # numbers per draw when not all are kept


def draw_part(part: Tensor, shape: torch.Size, offset: tuple[int, ...], std: float, seed: int) -> None:
    """Fill ``part`` with the numbers that ``torch.empty(shape).normal_(0, std)`` with this seed has there.

    Args:
        part: any dtype, on any device
        shape: of the whole tensor
        offset: of the part in it, one number per dimension
        std: standard deviation
        seed: of the generator
    """
    generator, row = torch.Generator().manual_seed(seed), shape[1:].numel()
    inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], part.shape[1:], strict=True))
    if part.shape == shape or row % BLOCK or not _skips():
        whole = torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
        part.copy_(whole[(slice(offset[0], offset[0] + len(part)), *inner)])
        return
    skip(generator, offset[0] * row)
    for some in part.split(max(1, _CHUNK // row)):
        drawn = torch.empty(len(some), *shape[1:], dtype=torch.float32).normal_(0.0, std, generator=generator)
        some.copy_(drawn[(slice(None), *inner)])


def skip(generator: torch.Generator, n: int) -> None:
    """Advance a freshly seeded CPU generator by n words."""
    if n:
        state = generator.get_state()
        words = state.numpy()[_HEAD : _HEAD + 8 * _N].view(np.uint64)
        ahead = np.lib.stride_tricks.sliding_window_view(_sequence(words.astype(np.uint32)), _N)
        words[:] = np.bitwise_xor.reduce(ahead[_terms(n)])
        generator.set_state(state)


def _sequence(first: np.ndarray) -> np.ndarray:
    """The generator's words 0 … 20,560 before tempering, from the first 624."""
    x = np.concatenate((first, np.empty(_DEGREE, np.uint32)))
    for i in range(_N, len(x), _N - _M):
        end = min(i + _N - _M, len(x))
        a, b, c = (x[i - back : end - back] for back in (_N, _N - 1, _N - _M))
        both = a & np.uint32(1 << 31) | b & np.uint32((1 << 31) - 1)
        x[i:end] = c ^ both >> np.uint32(1) ^ (both & np.uint32(1)) * np.uint32(_TWIST)
    return x


@cache
def _terms(n: int) -> np.ndarray:
    """The powers of t whose sum is tⁿ modulo the characteristic polynomial."""
    modulus, power = _characteristic(), 1
    for bit in f"{n:b}":
        power = int("0".join(f"{power:b}"), 2) << int(bit)  # over GF(2), a square is its terms squared
        while (excess := power.bit_length() - modulus.bit_length()) >= 0:
            power ^= modulus << excess
    return np.array([i for i, bit in enumerate(reversed(f"{power:b}")) if bit == "1"])


@cache
def _characteristic() -> int:
    """Bit i is the coefficient of tⁱ; Matsumoto and Nishimura 1998, appendix A."""
    found = 1
    for i in range(31):
        found = found << _N - 1 ^ found << _M - 1 ^ _TWIST >> i & 1
    return found << _N ^ found << _M ^ _TWIST >> 31


@cache
def _skips() -> bool:
    """Whether torch draws as assumed here; another version might not."""
    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    skip(one, 3 * BLOCK)
    return torch.equal(
        torch.randn(BLOCK, generator=one, dtype=torch.float32),
        torch.randn(4 * BLOCK, generator=other, dtype=torch.float32)[-BLOCK:],
    )


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
    # Qualified names of the matrices of heads → rows of a head
    blocks = {f"{path}." if path else "": m for path, m in module.named_modules() if isinstance(m, Block)}
    heads = {f"{path}{leaf}": rows for path, block in blocks.items() for leaf, rows in block.head_rows().items()}
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
