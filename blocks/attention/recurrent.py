"""Mixers that remember a state of fixed size: their base, and the two simplest of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.attention.base import Attention, even_heads
from blockwright.blocks.base import Placement
from blockwright.blocks.cache.fixed import State
from blockwright.blocks.depthwise import CausalConv
from blockwright.blocks.forward_pass import Carry, Pass
from blockwright.blocks.linear import Linear
from blockwright.blocks.norm import Norm
from blockwright.blocks.output_gate import OutputGate
from blockwright.registry import register
from blockwright.registry.ranges import Count, Taps

Parts = Mapping[str, Tensor]


class Recurrent(Attention):
    """A mixer that remembers a state of fixed size: the shared base of ``gated_delta``, ``mamba2`` and others.

    A subclass has ``mix``, and ``memory`` for what is remembered beside the tails of its convolutions, which are the
    submodules named ``NAME_conv``. By ``convolved`` and ``recurred`` it is remembered after each token where a cache
    notes each: a draft may be wrong from any token on. Only the recurrence is then computed token by token. A mixer
    with other memory that gives the last alone is repeated for each token. Its last projection is ``output``, or it
    names another in ``residual_outputs``.
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("output.weight",)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        """x [B,T,D], zero where it is padding → [B,T,D], and what is remembered after it, by name.

        Args:
            given: of the pass; without segments where something is held
            held: what is remembered from before x; None for nothing. Where it notes each token, what is remembered
                after each, [B,T,…] in place of [B,…]
        """
        raise NotImplementedError

    def memory(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the fp32 states of one row."""
        return {}

    def forward(self, x: Tensor, given: Pass) -> Tensor:
        held = given.cache if isinstance(given.cache, State) else None
        if held is None:
            return self.mix(x, given, None)[0]
        y, parts = self.mix(held.without_padding(x), given._replace(segments=None), held)
        if held.takes(parts, x.shape[1]):
            held.advance(x.shape[1], parts)
            return y
        return torch.cat([self.forward(token, each) for token, each in _by_token(x, given)], 1)

    def new_cache(
        self, batch: int, length: int, dtype: torch.dtype, device: torch.device, bits: int | None = None
    ) -> State:
        """As in the contract; ``bits`` are ignored: errors of a quantised state would add up over the tokens."""
        wide = dtype if dtype == torch.float64 else torch.float32  # torch promotes no float8
        parts: dict[str, Any] = {name: (shape, wide) for name, shape in self.memory().items()}
        for name, conv in self._convolutions().items():
            parts[name] = (conv.weight.shape[1] - 1, conv.weight.shape[0]), dtype
        return State(batch, length, parts, device)

    def convolved(self, name: str, x: Tensor, segments: Tensor | None, held: State | None) -> tuple[Tensor, Parts]:
        """silu(conv(W x)) of a projection [B,T,·], and the inputs that its convolution needs next, by name."""
        y, parts = self.shifted(name, self.get_submodule(name)(x), segments, held)
        return F.silu(y), parts

    def shifted(self, name: str, u: Tensor, segments: Tensor | None, held: State | None) -> tuple[Tensor, Parts]:
        """conv(u) of inputs [B,T,·], and those that the convolution needs next, by name."""
        y, inputs = self._convolutions()[name](u, segments, None if held is None else held.held[name])
        return y, {name: inputs[:, u.shape[1] :] if held is None else held.tails(name, inputs)}

    def before(self, x: Tensor, segments: Tensor | None, held: State | None) -> tuple[Tensor, Parts]:
        """x_{t−1} of each x_t [B,T,W], 0 for the first of a document, and what is remembered of it: ``last`` [W]."""
        first = torch.zeros_like(x[:, :1]) if held is None else held.held["last"][:, None].to(x.dtype)
        earlier = torch.cat((first, x[:, :-1]), 1)
        if segments is not None:
            same = segments[:, 1:] == segments[:, :-1]
            earlier = earlier * F.pad(same, (1, 0))[..., None]
        return earlier, {"last": self.noted(x, held)}

    def noted(self, values: Tensor, held: State | None) -> Tensor:
        """What is remembered of values [B,T,…]: those of the last token, or of each where ``held`` notes each."""
        return values if held is not None and held.notes_each else values[:, -1]

    def recurred(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        beta: Tensor | None,
        segments: Tensor | None,
        held: State | None,
        *,
        erase: Tensor | None = None,
        at: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Parts]:
        """The recurrence over T tokens from the ``state`` that is held, and this state after them.

        Args:
            q, k, v, decay, beta, segments, erase, at: as of ``blocks/kernels/recurrence.py``
            state: to begin with, in place of the one that is held
        """
        state = held.held["state"] if held is not None and state is None else state
        given = q, k, v, decay, beta
        if held is None or not held.notes_each:
            y, state = self.kernels.recur(*given, state, segments, erase, at)
            return y, {"state": state}
        y, after = self.kernels.recur_each(*given, state, None, erase, at)
        return y, {"state": after}

    def reset_parameters(self) -> None:
        for conv in self._convolutions().values():
            conv.reset_parameters()

    def convolutions(self) -> str:
        """How many tokens its convolutions see, for a label."""
        taps = {conv.weight.shape[1] for conv in self._convolutions().values()}
        return f"convolutions over {', '.join(map(str, sorted(taps)))} tokens"

    def _convolutions(self) -> dict[str, CausalConv]:
        return {n.removesuffix("_conv"): m for n, m in self.named_children() if isinstance(m, CausalConv)}


def _by_token(x: Tensor, given: Pass) -> Iterator[tuple[Tensor, Pass]]:
    """Each token x_t [B,1,D], and its pass; what the passes leave in ``carry``, or replace there, is joined behind the
    last. All else stays, as keys of other tokens that a layer below lends."""
    carried, left = list[Carry](), set[str]()
    for t, token in enumerate(x.split(1, 1)):
        of_token = {name: values[:, t : t + 1] for name, values in (given.carry or {}).items()}
        own = dict(of_token)
        yield token, given._replace(carry=None if given.carry is None else own)
        carried.append(own)
        left |= {name for name, values in own.items() if values is not of_token.get(name)}
    if given.carry is not None:
        given.carry.update({name: torch.cat([own[name] for own in carried], 1) for name in left})


@register("attention", "none")
class NoAttention(Recurrent):
    """No mixing of tokens: y = 0, for layers that have a feed-forward block alone.

    Nemotron-H, arXiv 2504.03624, alternates layers of one block each. With ``residual: {name: prenorm, attention_norm:
    none}`` the layer has no norm for it either.
    """

    empty: ClassVar[bool] = True
    residual_outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        return x * 0, {}  # not zeros: the norm before it must have a gradient, or data parallelism stops


@register("attention", "lightning")
class Lightning(Recurrent):
    """Lightning attention: linear attention whose state decays at a fixed rate for each head and depth.

    Qin et al. 2024, arXiv 2401.04658; MiniMax-01, arXiv 2501.08313: q, k, v = silu(W x); S ← e^{−s} S + k vᵀ;
    y = W_o gate(norm(Sᵀ q)), norm over all heads together, without softmax or scale, with head n of N in layer l of L
    decaying by s = 2^{−8n/N} (1 − l/(L − 1 + 1e-5) + 1e-5). MiniMax stores the three projections fused. The cache holds
    N·H·H fp32 numbers, whatever the length.

    Args:
        n_heads: N, heads
        head_dim: H, width of a head; null is d_model / n_heads
        norm: of all heads' outputs together
        output_gate: gates the normalised outputs; null for none
    """

    default_children: ClassVar[Mapping[str, Any]] = {"output_gate": {"name": "elementwise"}}

    def __init__(
        self,
        d_model: int,
        layer_idx: int,
        n_layers: int,
        norm: Norm,
        n_heads: Count = 8,
        head_dim: Count | None = None,
        output_gate: OutputGate | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or even_heads(d_model, n_heads)
        depth = 1 - layer_idx / (n_layers - 1 + 1e-5) + 1e-5
        rates = [2 ** (-8 * n / n_heads) * depth for n in range(1, n_heads + 1)]
        # A tensor, so that compiled layers share a graph. It stays on the CPU, and is no weight.
        self.rates = torch.tensor(rates, dtype=torch.float64, device="cpu")
        self.query, self.key, self.value = (Linear(d_model, n_heads * self.head_dim, bias=False) for _ in range(3))
        self.output = Linear(n_heads * self.head_dim, d_model, bias=False)
        self.norm, self.output_gate = norm, output_gate

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        H = known["head_dim"] or even_heads(known["d_model"], known["n_heads"])
        return {"dim": known["n_heads"] * H, "head_dim": H}

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        q, k, v = (
            F.silu(project(x)).unflatten(-1, (-1, self.head_dim)) for project in (self.query, self.key, self.value)
        )
        rates = self.rates.to(x.device, torch.promote_types(x.dtype, torch.float32))
        decay = -rates[:, None].expand(*v.shape[:3], 1)
        y, state = self.recurred(q, k, v, decay, None, given.segments, held)
        y = self.norm(y.flatten(-2)).view_as(y)
        y = y if self.output_gate is None else self.output_gate(x, y)
        return self.output(y.flatten(-2)), state

    def memory(self) -> dict[str, tuple[int, ...]]:
        return {"state": (len(self.rates), self.head_dim, self.head_dim)}

    def parallel_plan(self) -> dict[str, Placement]:
        split: dict[str, Placement] = {f"{name}.weight": "column" for name in ("query", "key", "value")}
        return {**split, "output.weight": "row"}


@register("attention", "short_conv")
class ShortConv(Recurrent):
    """A gated convolution over the last few tokens, without attention.

    LFM2, arXiv 2511.23404: y = W_o (W_C x ⊙ conv(W_B x ⊙ W_x x)). LFM2 stores the three projections fused. The cache
    holds (taps − 1)·D numbers, whatever the length.

    Args:
        taps: tokens seen, the current one included; 3 in LFM2
        bias: whether projections and convolution add a bias
    """

    def __init__(self, d_model: int, taps: Taps = 3, bias: bool = False) -> None:
        super().__init__()
        self.input, self.gate, self.value = (Linear(d_model, d_model, bias=bias) for _ in range(3))
        self.value_conv = CausalConv(d_model, taps, bias=bias)
        self.output = Linear(d_model, d_model, bias=bias)

    def mix(self, x: Tensor, given: Pass, held: State | None) -> tuple[Tensor, Parts]:
        u = self.input(x) * self.value(x)
        u = u if held is None else held.without_padding(u)  # of a bias
        y, tail = self.shifted("value", u, given.segments, held)
        return self.output(self.gate(x) * y), tail

    def parallel_plan(self) -> dict[str, Placement]:
        column = (name for name, _ in self.named_parameters() if not name.startswith("output"))
        split: dict[str, Placement] = dict.fromkeys(column, "column")
        return {**split, "output.weight": "row"}
