"""Cost of a composition, measured on the meta device: correct for unknown plug-in blocks too.

Parameters are counted by walking the modules: a block belongs to the family that its contract names. FLOPs are counted
by torch while the decoder runs; caches are made and their bytes added up. Identical layers are measured once.
Not counted: activations, communication, savings of fast kernels (a causal or windowed mask halves nothing here), and
padding: of values to the width of keys, and of experts' rows on a CPU (blocks/conformance/construction.py bounds it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.compose import compose
from blockwright.blocks.counting import forward_flops, trained_flops
from blockwright.blocks.decoder import Decoder
from blockwright.blocks.experts import Experts
from blockwright.blocks.ffn import FFN, rounded_width
from blockwright.blocks.forward_pass import Pass
from blockwright.blocks.gating.base import Routing
from blockwright.blocks.input import Input
from blockwright.blocks.memory import Table
from blockwright.blocks.sample import Sample, known, measurement, sampled

# Every parameter belongs to one family, that of its outermost module: MLA's norms count as attention. These are of
# every decoder; those of its inputs stand between the two.
_FIRST = (
    *("embedding", "position", "attention"),
    *("routed_experts", "shared_experts", "router", "dense_ffn", "norms"),
)
_LAST = ("head", "mtp", "other")
_OPEN = ("other", "mixture")  # families whose parts may belong to another


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a decoder.

    Args:
        total: all
        active: those that one token uses at inference: all, with k of E routed experts and the rows that it reads of
            the tables of memories, without multi-token prediction modules
        embedding: the input embedding's, included above; a tied head's matrix is this one
        head: the output head's, included above; 0 when tied
        families: family → its parameters; their sum is ``total``
        idle_experts: parameters of routed experts that a token does not use
        tables: parameters in the tables of memories, included above
    """

    total: int
    active: int
    embedding: int
    head: int = 0
    families: Mapping[str, int] = field(default_factory=dict)
    idle_experts: int = 0
    tables: int = 0

    @property
    def active_ffn(self) -> int:
        """Parameters of feed-forward blocks that one token uses, without routers."""
        parts = ("routed_experts", "shared_experts", "dense_ffn")
        return sum(self.families[part] for part in parts) - self.idle_experts


def count_parameters(decoder: Decoder | Sample) -> Parameters:
    """Count parameters; the share of experts that a token uses is read off an actual routing."""
    families = count_families(decoder)
    probe, groups = _sampled(decoder)
    pairs = [(len(group), layer) for layer, group in zip(probe.layers, groups, strict=True)]
    idle, unread = (sum(n * of(layer, probe) for n, layer in pairs) for of in (idle_experts, unread_rows))
    tables = sum(n * _numel(_tables(layer)) for n, layer in pairs)
    total = sum(families.values())
    active = total - idle - unread - families["mtp"]
    return Parameters(total, active, families["embedding"], families["head"], families, idle, tables)


def in_order(families: Iterable[str]) -> list[str]:
    """Families of parameters in the order of a cost card, which always has those of a decoder of text."""
    usual = (*_FIRST, *_LAST)
    return [*_FIRST, *dict.fromkeys(family for family in families if family not in usual), *_LAST]


def count_families(decoder: Decoder | Sample) -> dict[str, int]:
    """Parameters of each family; a shared tensor counts once, where it occurs first."""
    frame = decoder if isinstance(decoder, Decoder) else decoder.decoder.with_layers([])
    counts: Counter[str] = Counter()
    seen: set[int] = set()
    ends = {"embedding": "embedding", "head": "head", "mtp": "mtp"}
    children = dict(frame.named_children())
    order = sorted(children, key=lambda name: ("embedding", "head").index(name) if name in ("embedding", "head") else 2)
    for name in order:
        _count(children[name], ends.get(name, "other"), counts, seen)
    _count_own(frame, "other", counts, seen)
    if isinstance(decoder, Sample):
        for layer, indices in zip(decoder.decoder.layers, decoder.layers, strict=True):
            times = len(indices)
            of_one: Counter[str] = Counter()
            _count(layer, "other", of_one, set())
            for family, number in of_one.items():
                counts[family] += times * number
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


def idle(layer: nn.Module, decoder: Decoder) -> int:
    """Parameters of a layer that a token does not use: of routed experts, and of tables.

    Args:
        layer, decoder: on the meta device
    """
    return idle_experts(layer, decoder) + unread_rows(layer, decoder)


def idle_experts(layer: nn.Module, decoder: Decoder) -> int:
    """Parameters of the routed experts of a layer that a token does not use.

    Args:
        layer, decoder: on the meta device
    """
    ffn: Any = layer.ffn
    measured, what = known(), measurement("idle", ffn, decoder.embedding.weight)
    if what not in measured:
        routing, n_tokens = _routing(ffn, decoder, 1), 1
        if routing is not None and routing.pairs is not None:
            n_tokens = MANY  # experts per token is an average, which one token cannot show
            routing = _routing(ffn, decoder, n_tokens)
        measured[what] = _idle(ffn, routing, n_tokens)
    return measured[what]


def unread_rows(layer: nn.Module, decoder: Decoder) -> int:
    """Parameters in the tables of a layer's memory that a token does not read.

    Args:
        layer, decoder: on the meta device
    """
    memory: Any = layer.memory
    if memory is None:
        return 0
    measured, what = known(), measurement("unread", memory, decoder.embedding.weight)
    if what not in measured:
        measured[what] = _numel(_tables(memory)) - numbers_read(layer, decoder)
    return measured[what]


def numbers_read(layer: nn.Module, decoder: Decoder) -> int:
    """Numbers that one token reads of the tables of a layer's memory.

    Args:
        layer, decoder: on the meta device
    """
    memory: Any = layer.memory
    if memory is None:
        return 0
    residual: Any = layer.residual
    x, given = _tokens(decoder, 1)
    found: list[int] = []
    hooks = [t.register_forward_hook(lambda _, ids, rows: found.append(rows.numel())) for t in _tables(memory)]
    try:
        with torch.no_grad():
            memory(residual.open(x), given)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found)


def _tables(module: nn.Module) -> list[Table]:
    return [m for m in module.modules() if isinstance(m, Table)]


def _numel(modules: Iterable[nn.Module]) -> int:
    """Parameters of modules that share none."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def _routing(ffn: FFN, decoder: Decoder, n_tokens: int) -> Routing | None:
    x, given = _tokens(decoder, n_tokens)
    with torch.no_grad():
        routing: Routing | None = ffn(x, given)[1]
    return routing


def _tokens(decoder: Decoder, length: int) -> tuple[Tensor, Pass]:
    """Input of a mixer of any layer, [1,T,D] on the meta device, and what it is given with it."""
    weight = decoder.embedding.weight
    x = torch.empty(1, length, weight.shape[1], dtype=weight.dtype, device="meta")
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    return x, Pass(torch.zeros_like(tokens), tokens=tokens, embedded=x, carry={}, losses={})


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


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def forward_flops_per_token(model: Mapping[str, Any] | Decoder | Sample, length: int) -> float:
    """FLOPs of the forward pass with the head, per token of a sequence of ``length``; attention not halved for
    causality, a multiplication and an addition counted as two.

    Args:
        model: a composition, or a decoder on any device
        length: T, tokens
    """
    return _pass_flops(_sampled(model), length, learns=False) / length


def _pass_flops(made: Sample, length: int, learns: bool) -> int:
    """FLOPs of a pass through a decoder, and of the gradients if it ``learns``."""
    decoder, groups = made
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    around = forward_flops(lambda: decoder.with_layers([])(tokens)) + _loop_flops(decoder, length)
    measured = known()
    layers = (
        decoder.visits(group) * _layer_flops(layer, decoder, length, measured, learns)
        for layer, group in zip(decoder.layers, groups, strict=True)
    )
    return around * (3 if learns else 1) + sum(layers)


def _loop_flops(decoder: Decoder, length: int) -> int:
    """FLOPs of what a loop computes between its layers."""
    if (loop := decoder.loop) is None:
        return 0
    x = _tokens(decoder, length)[0]

    def visit() -> None:
        states = loop(x, loop.visits, lambda x, index: x, decoder.norm)
        if loop.exit is not None:
            loop.exit.choose(states, decoder.norm)

    return forward_flops(visit)


def _sampled(model: Mapping[str, Any] | Decoder | Sample) -> Sample:
    """One of each group of equal layers, on the meta device, where everything here is measured."""
    if not isinstance(model, Mapping):
        decoder = model.decoder if isinstance(model, Sample) else model
        if decoder.embedding.weight.is_meta:
            return sampled(model)
        model = decoder.config  # kernels of a CPU take no input without numbers
    return sampled(compose(model, device="meta"))


def _layer_flops(layer: nn.Module, decoder: Decoder, length: int, measured: dict[Any, int], learns: bool) -> int:
    """FLOPs of a layer alone: those of its mixers, and those of its residual block between them.

    Args:
        measured: what a part computes with, and its input → its FLOPs; layers often differ in one part only
        learns: with those of the gradients
    """
    attention, ffn, memory, residual = (getattr(layer, part) for part in ("attention", "ffn", "memory", "residual"))
    x, fed = _tokens(decoder, length)[0], length

    def mix(h: Tensor, places: Tensor | None = None) -> Tensor:
        return h.clone()

    def feed(h: Tensor, places: Tensor | None = None) -> Tensor:
        nonlocal fed
        fed = h.shape[1]
        return h.clone()

    def connect(x: Tensor, given: Pass) -> Tensor:
        return residual.close(residual(residual.open(x), mix, feed, given), given)

    def once(part: nn.Module, run: Callable[[Tensor, Pass], Any], n_tokens: int = length) -> int:
        x, given = _tokens(decoder, n_tokens)
        if (what := measurement("trained" if learns else "flops", part, x)) not in measured:
            if learns:
                x.requires_grad_()
                measured[what] = trained_flops(lambda: (_learnt(run(x, given)), given.losses, given.carry), part)
            else:
                measured[what] = forward_flops(lambda: run(x, given))
        return measured[what]

    with _in_mode(layer, learns):
        with torch.no_grad():
            connect(x, _tokens(decoder, length)[1])
        mixers = once(attention, attention) + once(ffn, ffn, fed)  # a residual block may give the ffn fewer tokens
        recalled = 0 if memory is None else once(memory, lambda x, given: memory(residual.open(x), given))
        return mixers + recalled + once(residual, connect)


@contextmanager
def _in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Some blocks compute less, or more, in training: ``mixture_of_depths`` then feeds the chosen tokens alone."""
    modes = {part: part.training for part in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def _learnt(out: Any) -> Any:
    """What of a mixer's output has gradients: with a routing, its losses."""
    if not isinstance(out, tuple):
        return out
    y, routing = out
    return y, None if routing is None else routing.losses


def training_flops_per_token(model: Mapping[str, Any] | Decoder | Sample, length: int) -> float:
    """FLOPs of one training step, per token: of the forward pass, of the gradients, and of all depths of multi-token
    prediction, with the head for each. Recomputation is not in it.

    A product has two in the backward pass. So most blocks cost three times their forward pass; less where no gradient
    passes, as through the choice of a selector, or where it has a formula of its own; more where a loss is of training
    alone. A loop makes as many visits as outside of training, with the head for each that tokens may leave after; its
    visits without gradients have no backward pass.

    Arguments as in ``forward_flops_per_token``.
    """
    return flops_per_token(model, length)[1]


def flops_per_token(model: Mapping[str, Any] | Decoder | Sample, length: int) -> tuple[float, float]:
    """``forward_flops_per_token`` and ``training_flops_per_token``."""
    made = _sampled(model)
    forward, loop = _pass_flops(made, length, learns=False), made.decoder.loop
    further = _mtp_flops(made.decoder, length) + 3 * _exit_flops(made.decoder, length)
    if loop is None or loop.gradient_visits is None or loop.gradient_visits >= loop.visits:
        trained = _pass_flops(made, length, learns=True)
    else:
        learned = Sample(made.decoder.with_visits(loop.gradient_visits), made.layers)
        unlearned = forward - _pass_flops(learned, length, learns=False)
        trained = unlearned + _pass_flops(learned, length, learns=True)
    return forward / length, (trained + further) / length


def _exit_flops(decoder: Decoder, length: int) -> int:
    """FLOPs of the head after all visits but the last."""
    if decoder.loop is None or decoder.loop.exit is None:
        return 0
    x = _tokens(decoder, length)[0]
    return (decoder.loop.visits - 1) * forward_flops(lambda: decoder.logits(x))


def _mtp_flops(decoder: Decoder, length: int) -> int:
    """FLOPs of multi-token prediction and of its gradients."""
    if not len(decoder.mtp):
        return 0
    hidden = _tokens(decoder, length)[0].requires_grad_()
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    made = decoder.mtp_states
    return trained_flops(
        lambda: [(decoder.logits(h), routing and routing.losses) for h, routing in made(hidden, tokens)],
        decoder,
    )


def input_flops(block: Input, content: Any) -> int:
    """FLOPs of embedding content of an input, on the meta device."""
    return forward_flops(lambda: block(content))


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
        n_layers: L, each visit of a loop counted
        d_model, vocab_size: d, V
        ffn_ratio: ρ, active feed-forward width relative to a standard block
        length: T, tokens
    """
    layers = n_layers * d_model**2 * (24 + 48 * ffn_ratio)
    return length * (layers + 12 * n_layers * d_model * length + 6 * vocab_size * d_model)


# --- cache ------------------------------------------------------------------------------------------------------------


FAR = 2**17  # tokens; more than any usual window


def growth_beyond_windows(decoder: Decoder | Sample) -> float:
    """Numbers that all caches of a sequence grow by for each token, where windows are full; arguments as below."""
    near, far = (cache_bytes(decoder, length, torch.float32) // 4 for length in (FAR, 2 * FAR))
    return (far - near) / FAR


def cache_bytes_per_token(decoder: Decoder | Sample, length: int, dtype: torch.dtype) -> float:
    """Bytes of all caches of one sequence of ``length`` tokens, divided by them; errors as below.

    What a token adds, where all is kept of every token; windows that are full and states that do not grow weigh the
    less, the longer the sequence is.
    """
    return cache_bytes(decoder, length, dtype) / length


def cache_bytes(decoder: Decoder | Sample, length: int, dtype: torch.dtype, bits: int | None = None) -> int:
    """Bytes of all caches of one sequence of ``length`` tokens, measured on the meta device.

    Args:
        bits: 8, 6 or 4 for quantised caches, scales included; None for numbers of ``dtype``

    Raises:
        NotImplementedError: an attention of this decoder has no ``new_cache``
        BlockError: one has no cache with these bits
    """
    of_one = (1, length, dtype, torch.device("meta"), bits)
    one_of_each, groups = sampled(decoder)
    layers: Any = one_of_each.layers
    made = zip(layers, groups, strict=True)
    return sum(one_of_each.visits(group) * layer.new_cache(*of_one).nbytes for layer, group in made)
