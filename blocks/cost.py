"""Cost of a composition, measured on the meta device: correct for unknown plug-in blocks too.

Parameters are counted by walking the modules: a block belongs to the family that its contract names. FLOPs are counted
by torch while the decoder runs; caches are made and their bytes added up. Identical layers are measured once.
Not counted: activations, communication, savings of fast kernels (a causal or windowed mask halves nothing here).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from blockwright.blocks.attention.base import empty_cache
from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.experts.base import Experts
from blockwright.blocks.ffn.base import FFN, rounded_width
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.input import Input

# Every parameter belongs to one family, that of its outermost module: MLA's norms count as attention. These are of
# every decoder; those of its inputs stand between the two.
_FIRST = (
    "embedding",
    "position",
    "attention",
    "routed_experts",
    "shared_experts",
    "router",
    "dense_ffn",
    "norms",
)
_LAST = ("head", "mtp", "other")
_OPEN = ("other", "mixture")  # families whose parts may belong to another


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a decoder.

    Args:
        total: all
        active: those that one token uses at inference: all, with k of E routed experts, without multi-token prediction
            modules
        embedding: the input embedding's, included above; a tied head's matrix is this one
        head: the output head's, included above; 0 when tied
        families: family → its parameters; their sum is ``total``
        idle_experts: parameters of routed experts that a token does not use
    """

    total: int
    active: int
    embedding: int
    head: int = 0
    families: Mapping[str, int] = field(default_factory=dict)
    idle_experts: int = 0

    @property
    def active_ffn(self) -> int:
        """Parameters of feed-forward blocks that one token uses, without routers."""
        parts = ("routed_experts", "shared_experts", "dense_ffn")
        return sum(self.families[part] for part in parts) - self.idle_experts


def count_parameters(decoder: Decoder) -> Parameters:
    """Count parameters; the share of experts that a token uses is read off an actual routing."""
    families = count_families(decoder)
    idle = _idle_experts(decoder)
    total = sum(families.values())
    active = total - idle - families["mtp"]
    return Parameters(total, active, families["embedding"], families["head"], families, idle)


def in_order(families: Iterable[str]) -> list[str]:
    """Families of parameters in the order of a cost card, which always has those of a decoder of text."""
    usual = (*_FIRST, *_LAST)
    return [*_FIRST, *dict.fromkeys(family for family in families if family not in usual), *_LAST]


def count_families(decoder: Decoder) -> dict[str, int]:
    """Parameters of each family; a shared tensor counts once, where it occurs first."""
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    ends = {"embedding": "embedding", "head": "head", "mtp": "mtp"}
    children = dict(decoder.named_children())
    order = sorted(children, key=lambda name: ("embedding", "head").index(name) if name in ("embedding", "head") else 2)
    for name in order:
        _count(children[name], ends.get(name, "other"), counts, seen)
    _count_own(decoder, "other", counts, seen)
    counts["other"] += counts.pop("mixture", 0)
    return {family: counts[family] for family in in_order(counts)}


def _count(module: nn.Module, family: str, counts: Counter[str], seen: set[int]) -> None:
    family = _family(module, family)
    _count_own(module, family, counts, seen)
    for child in module.children():
        _count(child, family, counts, seen)


def _count_own(module: nn.Module, family: str, counts: Counter[str], seen: set[int]) -> None:
    for parameter in module.parameters(recurse=False):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            counts[family] += parameter.numel()


def _family(module: nn.Module, around: str) -> str:
    """The family of a module inside one of family ``around``."""
    if around not in _OPEN:
        return around
    if isinstance(module, FFN):
        if any(isinstance(m, Experts) for m in module.modules()):
            return "mixture"
        return "shared_experts" if around == "mixture" else "dense_ffn"
    return (module.counted_as if isinstance(module, Block) else None) or around


MANY = 80_640  # tokens; divisible by every usual number of experts


def _idle_experts(decoder: Decoder) -> int:
    groups = alike(decoder.layers)
    meta = decoder if decoder.embedding.weight.is_meta else compose(decoder.config, device="meta")
    probe, n_tokens = meta.with_layers(meta.layers[group[0]] for group in groups), 1
    routings = _routings(probe, n_tokens)
    if any(routing is not None and routing.pairs is not None for routing in routings):
        n_tokens = MANY  # experts per token is an average, which one token cannot show
        routings = _routings(probe, n_tokens)
    pairs = zip(groups, routings, strict=True)
    return sum(len(group) * _idle(decoder.layers[group[0]], routing, n_tokens) for group, routing in pairs)


def _routings(decoder: Decoder, n_tokens: int) -> list[Routing | None]:
    with torch.no_grad():
        return decoder.hidden(torch.zeros(1, n_tokens, dtype=torch.long, device="meta"))[1]


def _idle(layer: nn.Module, routing: Routing | None, n_tokens: int) -> int:
    if routing is None:
        return 0
    stacked = sum(p.numel() for m in layer.modules() if isinstance(m, Experts) for p in _stacks(m))
    visits = routing.experts.numel() if routing.pairs is None else routing.pairs
    possible = routing.load.shape[0] * n_tokens
    return stacked * (possible - visits) // possible


def _stacks(experts: Experts) -> list[nn.Parameter]:
    """The parameters that each expert has a part of: not those through which all tokens pass."""
    own = dict(experts.named_parameters())
    return [own[name] for name, how in experts.parallel_plan().items() if how == "expert"]


# --- identical layers -------------------------------------------------------------------------------------------------


def alike(layers: Sequence[nn.Module] | nn.ModuleList) -> list[list[int]]:
    """Groups of layers (indices) with equal cost: same classes, shapes and settings.

    A block that stores its ``layer_idx``, or differs in anything else, is alone in its group.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, layer in enumerate(layers):
        groups.setdefault(signature(layer), []).append(index)
    return list(groups.values())


_INTERNAL = frozenset(vars(nn.Module()))


def signature(layer: nn.Module) -> tuple[Any, ...]:
    """What a module computes with: classes, settings and shapes of all its parts."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    shapes = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors]
    settings = [
        (name, type(m), sorted((k, repr(v)) for k, v in vars(m).items() if k not in _INTERNAL))
        for name, m in layer.named_modules()
    ]
    return repr(settings), tuple(shapes)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def forward_flops_per_token(model: Mapping[str, Any] | Decoder, length: int) -> float:
    """FLOPs of the forward pass with the head, per token of a sequence of ``length``; attention not halved for
    causality, a multiplication and an addition counted as two.

    Args:
        model: a composition, or a decoder on the meta device
        length: T, tokens
    """
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    around = _flops(decoder, [], length)
    layers = sum(len(group) * (_flops(decoder, group[:1], length) - around) for group in alike(decoder.layers))
    return (around + layers) / length


def training_flops_per_token(model: Mapping[str, Any] | Decoder, length: int) -> float:
    """FLOPs of one training step, per token: three times those of the forward pass, whose every product has two in the
    backward pass, and of all depths of multi-token prediction, with the head for each. Recomputation is not in it.

    Arguments as in ``forward_flops_per_token``.
    """
    decoder = model if isinstance(model, Decoder) else compose(model, device="meta")
    return 3 * (forward_flops_per_token(decoder, length) + _mtp_flops(decoder, length) / length)


def _mtp_flops(decoder: Decoder, length: int) -> int:
    if not len(decoder.mtp):
        return 0
    from torch.utils.flop_counter import FlopCounterMode

    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    hidden = torch.empty(1, length, decoder.config["d_model"], dtype=decoder.embedding.weight.dtype, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        for states, _ in decoder.mtp_states(hidden, tokens):
            decoder.logits(states)
    return counter.get_total_flops()


def _flops(decoder: Decoder, indices: Sequence[int], length: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # imports triton, which refusals of a run have no time for

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.with_layers(decoder.layers[i] for i in indices)(torch.zeros(1, length, dtype=torch.long, device="meta"))
    return counter.get_total_flops()


def input_flops(block: Input, content: Any) -> int:
    """FLOPs of embedding content of an input, on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        block(content)
    return counter.get_total_flops()


def ffn_ratio(decoder: Decoder, counted: Parameters) -> float:
    """ρ: active feed-forward parameters per layer, relative to a standard block of the model's width.

    The standard is a SwiGLU of 8/3 d_model, rounded up to a multiple of 256 as in published models: DeepSeek 7B,
    67B and Llama-2 7B have ρ = 1.
    """
    d_model, n_layers = decoder.config["d_model"], len(decoder.layers)
    return counted.active_ffn / (n_layers * 3 * d_model * rounded_width(8 * d_model / 3, 256))


def deepseek_moe_flops(n_layers: int, d_model: int, vocab_size: int, ffn_ratio: float, length: int) -> float:
    """Training FLOPs of one sequence, by the formula behind DeepSeekMoE's figures.

    arXiv 2401.06066: T · [L d² (24 + 48ρ) + 12 L d T + 6 V d]: forward and backward, attention not causal, every
    attention counted as full MHA, routers left out. For what *this* composition computes, see
    ``forward_flops_per_token``. The paper's 145B takes ρ in units of exactly 8/3 d.

    Args:
        n_layers, d_model, vocab_size: L, d, V
        ffn_ratio: ρ, active feed-forward width relative to a standard block
        length: T, tokens
    """
    layers = n_layers * d_model**2 * (24 + 48 * ffn_ratio)
    return length * (layers + 12 * n_layers * d_model * length + 6 * vocab_size * d_model)


# --- cache ------------------------------------------------------------------------------------------------------------


FAR = 2**17  # tokens; more than any usual window


def growth_beyond_windows(decoder: Decoder) -> float:
    """Numbers that all caches of a sequence grow by for each token, where windows are full; arguments as below."""
    near, far = (cache_bytes(decoder, length, torch.float32) // 4 for length in (FAR, 2 * FAR))
    return (far - near) / FAR


def cache_bytes_per_token(decoder: Decoder, length: int, dtype: torch.dtype) -> float:
    """Bytes of all caches of one sequence of ``length`` tokens, divided by them; errors as below.

    What a token adds, where all is kept of every token; windows that are full and states that do not grow weigh the
    less, the longer the sequence is.
    """
    return cache_bytes(decoder, length, dtype) / length


def cache_bytes(decoder: Decoder, length: int, dtype: torch.dtype, bits: int | None = None) -> int:
    """Bytes of all caches of one sequence of ``length`` tokens, measured on the meta device.

    Args:
        bits: 8, 6 or 4 for quantised caches, scales included; None for numbers of ``dtype``

    Raises:
        NotImplementedError: an attention of this decoder has no ``new_cache``
        BlockError: one has no cache with these bits
    """
    total, of_one = 0, (1, length, dtype, torch.device("meta"), bits)
    for group in alike(decoder.layers):
        attention: Any = decoder.layers[group[0]].attention
        total += len(group) * empty_cache(attention, *of_one).nbytes
    return total
