"""The contract of ``gating``: choose experts for each token, and report the load."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from blockwright.blocks.balance import Balance
from blockwright.blocks.base import Block, Drawn, Kind, Placement
from blockwright.blocks.precision import KeepsDtype, full_linear, unlowered
from blockwright.registry import BlockError, family

Masked = Literal["exclude", "zero"]
FILL = {"exclude": float("-inf"), "zero": 0.0}  # value of scores outside the kept groups


class Routing(NamedTuple):
    """Expert assignment of T tokens, all those of the batch.

    experts: [T,k] int64, the experts chosen for each token; the value E means no expert, as for all of padding
    weights: [T,k] fp32, factors on the experts' outputs; the router's gradient flows through them
    probs: [T,E] fp32, affinities before any selection bias or group mask
    losses: name → scalar, already weighted, added to the training loss; also those of the layer's attention
    load: [E] fp32, tokens per expert (no gradient); padding is no token
    pairs: at most how many entries of ``experts`` are below E, known without asking the device: so many rows are
        computed, those without an expert with weight 0; None: all T·k
    seen: what else ``Gating.update`` learns of the tokens, [E,…], to be added up over a step; None: the load
    """

    experts: Tensor
    weights: Tensor
    probs: Tensor
    losses: dict[str, Tensor]
    load: Tensor
    pairs: int | None = None
    seen: Tensor | None = None

    @property
    def counted(self) -> Tensor:
        """What is added up over a step for ``Gating.update``."""
        return self.load if self.seen is None else self.seen


def routed(
    experts: Tensor, weights: Tensor, probs: Tensor, real: Tensor | None = None, pairs: int | None = None
) -> Routing:
    """The routing of choices, without losses; padding goes to no expert.

    Args:
        experts, weights, probs, pairs: as in ``Routing``
        real: [B,T] or [T], which are tokens and not padding; None for all
    """
    E = probs.shape[-1]
    if real is not None:
        padding = ~real.flatten()[:, None]
        experts, weights = experts.masked_fill(padding, E), weights.masked_fill(padding, 0)
        pairs = rows(experts, E, pairs)
    return Routing(experts, weights, probs, {}, count(experts, E), pairs)


def with_losses(routing: Routing | None, losses: dict[str, Tensor]) -> Routing | None:
    """The routing of a layer with the losses of its attention. Where it does not route but has losses, a routing of no
    tokens to no experts."""
    if not losses:
        return routing
    if routing is None:
        none = next(iter(losses.values())).new_zeros(0, 0)
        routing = Routing(none.long(), none, none, {}, none[0:0].flatten(), 0)
    return routing._replace(losses={**routing.losses, **losses})


@family("gating", context=("n_experts", "vocab_size"))
class Gating(KeepsDtype, Block):
    """Routes tokens.

    State that changes between steps is a buffer, changed by ``update`` once per optimizer step, never in ``forward``,
    which runs twice where activations are recomputed; a choice is made once (``decides``). Buffers keep their dtype
    when the model is cast: routing state in bfloat16 would lose its small steps.

    Class attributes:
        by_id: whether it routes by the tokens' ids, which all places of an input share
    """

    by_id: ClassVar[bool] = False
    decides: ClassVar[str | None] = "forward"
    counted_as: ClassVar[str | None] = "router"

    def __init__(self, n_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            rule = f"must be between 1 and n_experts ({n_experts})"
            raise BlockError("top_k", top_k, rule, "Lower top_k, or give the ffn more experts (model.ffn.n_experts)")
        self.n_experts, self.top_k = n_experts, top_k

    def forward(
        self,
        x: Tensor,
        tokens: Tensor | None = None,
        experts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Routing:
        """Route x, [B,T,D] or [T,D] for one sequence, with the ids of its tokens; the routing has all tokens in order.

        The batch dimension matters because some balance losses are means over sequences.

        Args:
            experts: those of an earlier routing, [T,k], to be weighed again in place of a choice (routing replay); −1
                or E where a token's are to be chosen. A plug-in may omit this parameter: its routing cannot be replayed
            real: which of x are tokens and not padding, [B,T] or [T]; None for all. Padding moves nothing: no choice of
                a token, no load, no loss (``routed``)
        """
        raise NotImplementedError

    def drawn(self) -> Drawn:
        return Drawn(hides=("top_k",), chosen=(self.top_k, self.n_experts))

    def update(self, counted: Tensor) -> None:
        """Update state after an optimizer step; ``counted`` sums ``Routing.counted`` over all its micro-batches."""


class LinearGating(Gating):
    """Gates with a learned router: logits = W read(x) (+ b). Subclasses turn logits into choices by ``choose``.

    The router computes in fp32 whatever the model's precision.
    """

    decides: ClassVar[str | None] = "route"  # of [T,E] logits: the states that the router reads are recomputed
    weight_kinds: ClassVar[Mapping[str, Kind]] = {"weight": "matrix"}

    def __init__(
        self, d_model: int, n_experts: int, top_k: int, balance: list[Balance] | None, bias: bool = False
    ) -> None:
        super().__init__(n_experts, top_k)
        self.balance = nn.ModuleList(balance or [])
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        self.logit_bias = nn.Parameter(torch.empty(n_experts)) if bias else None
        self._chooses_among = "real" in inspect.signature(type(self).choose).parameters

    def read(self, x: Tensor) -> Tensor:
        """What the router reads of x [B,T,D], of the same shape; by default x itself."""
        return x

    def choose(self, logits: Tensor, experts: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Router logits [T,E] → experts [T,k], weights [T,k], affinities [T,E]; fp32 in, fp32 out.

        A gate whose choice for a token depends on other tokens takes ``real`` [T] as a parameter, and leaves padding
        out; the others need not know.

        Args:
            experts: [T,k], weighed in place of a choice. A plug-in may omit this parameter, as in ``forward``
        """
        raise NotImplementedError

    def parallel_plan(self) -> dict[str, Placement]:
        return {"weight": "replicate", **({} if self.logit_bias is None else {"logit_bias": "replicate"})}

    def pairs(self, experts: Tensor) -> int | None:
        """How many of the experts that ``choose`` gave, [T,k], are below E; None: all of them."""
        return None

    def forward(
        self,
        x: Tensor,
        tokens: Tensor | None = None,
        experts: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Routing:
        with unlowered(x):
            bias = None if self.logit_bias is None else self.logit_bias.float()
            logits = full_linear(self.read(x).flatten(0, -2).float(), self.weight.float(), bias)
        return self.route(logits, x.shape[-2], experts, real)

    def route(self, logits: Tensor, length: int, experts: Tensor | None, real: Tensor | None) -> Routing:
        """The routing of router logits [T,E] of sequences of a length; the others as in ``forward``."""
        with unlowered(logits):
            if experts is None:
                among = {"real": real.flatten()} if self._chooses_among and real is not None else {}
                experts, weights, probs = self.choose(logits, **among)
            else:
                none = (experts < 0) | (experts >= self.n_experts)
                experts = torch.where(none, self.choose(logits)[0], experts)
                experts, weights, probs = self.choose(logits, experts)
        routing = routed(experts, weights, probs, real, self.pairs(experts))
        seen = self.see(probs.detach(), real) if self.training else None
        return routing._replace(losses=self._losses(routing, logits, length, real), seen=seen)

    def see(self, probs: Tensor, real: Tensor | None) -> Tensor | None:
        """``Routing.seen`` of affinities [T,E] in training; by default the load is enough.

        Args:
            real: which rows are tokens and not padding, [B,T] or [T]; None for all
        """
        return None

    def _losses(self, routing: Routing, logits: Tensor, length: int, real: Tensor | None) -> dict[str, Tensor]:
        """The balance losses of sequences of a length, by name."""
        losses: dict[str, Tensor] = {}
        given = [t.unflatten(0, (-1, length)) for t in (routing.probs, routing.experts, logits)]
        given += [] if real is None else [real.reshape(-1, length)]
        for balance in self.balance:
            for name, loss in balance(*given).items():
                losses[name] = losses.get(name, 0) + loss
        return losses


@contextmanager
def updating(model: nn.Module) -> Iterator[None]:
    """Context in which every gate in training updates after each pass, by what that counted: steps of a batch each."""

    def update(gate: Any, given: Any, routing: Routing) -> None:
        gate.update(routing.counted)

    hooks = [gate.register_forward_hook(update) for gate in model.modules() if isinstance(gate, Gating)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def highest(scores: Tensor, k: int, experts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k highest of scores [T,E] and whose they are, both [T,k]; if experts are given, their scores."""
    return scores.topk(k) if experts is None else (scores.gather(-1, experts), experts)


def replays(gate: Gating) -> bool:
    """Whether the experts of an earlier routing can be given to a gate."""
    methods: list[Any] = [gate.forward, *([gate.choose] if isinstance(gate, LinearGating) else [])]
    return all("experts" in inspect.signature(method).parameters for method in methods)


def count(experts: Tensor, n_experts: int) -> Tensor:
    """Choices [T,k] → how many tokens chose each expert, [E] fp32."""
    one = torch.ones(experts.numel(), dtype=torch.float32, device=experts.device)
    load = one.new_zeros(n_experts + 1)  # the last entry counts "no expert"
    return load.scatter_add_(0, experts.flatten(), one)[:n_experts]


def rows(experts: Tensor, n_experts: int, most: int | None) -> int | None:
    """``Routing.pairs`` of choices some of which are of no expert: their number, where counting them is free. Elsewhere
    the host would wait for the device, and a compiler begin a new graph, in every layer: there as many as before.

    Args:
        experts: [T,k]
        most: ``pairs`` before
    """
    if experts.is_cpu and not torch.compiler.is_compiling():
        return int((experts < n_experts).sum())
    return most


def keep_groups(scores: Tensor, group_scores: Tensor, top_groups: int, fill: float = float("-inf")) -> Tensor:
    """Scores [T,E] with ``fill`` outside the ``top_groups`` groups of highest group_scores [T,G]."""
    kept = torch.zeros_like(group_scores, dtype=torch.bool)
    kept = kept.scatter(1, group_scores.topk(top_groups, sorted=False).indices, True)
    each = scores.shape[1] // group_scores.shape[1]
    return scores.masked_fill(~kept.repeat_interleave(each, 1), fill)


def check_groups(n_experts: int, n_groups: int, top_groups: int, top_k: int) -> None:
    """Refuse groups that do not divide the experts, or that leave a token fewer than top_k experts.

    Raises:
        BlockError
    """
    if n_groups < 1 or n_experts % n_groups:
        remedy = "Choose a divisor of the number of experts"
        raise BlockError("n_groups", n_groups, f"must divide n_experts ({n_experts})", remedy)
    if not 1 <= top_groups <= n_groups:
        raise BlockError("top_groups", top_groups, f"must lie between 1 and n_groups ({n_groups})", "Lower top_groups")
    if top_k > top_groups * (n_experts // n_groups):
        rule = f"the {top_groups} kept groups hold {top_groups * (n_experts // n_groups)} experts"
        raise BlockError("top_k", top_k, rule, "Lower top_k, or keep more groups (top_groups)")
