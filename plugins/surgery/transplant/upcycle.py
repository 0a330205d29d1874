"""A dense feed-forward block → a mixture of experts: what its ways have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blockwright.blocks.base import Block
from blockwright.blocks.experts import SwiGLUExperts
from blockwright.blocks.ffn import MoE, Shortcut, SwiGLU
from blockwright.blocks.gating.base import Gating, LinearGating
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, computes_alike, shapes
from blockwright.registry import BlockError, register
from blockwright.registry.ranges import Share

PROBES, SAME = 64, 1e-4  # random tokens that a gate weighs, and how equal the sums of its weights must be


class Upcycle(Transplant):
    """``swiglu`` → ``moe`` with experts ``swiglu`` and no shared expert, unless a subclass says otherwise.

    Komatsuzaki et al. 2022, arXiv 2212.05055, begin from copies.
    """

    handles: ClassVar[tuple[str, ...]] = ("name", "gate", "up", "down", "gating", "experts", "shared")

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        mixture = is_plain(old, SwiGLU) and isinstance(new, MoE) and is_plain(new.experts, SwiGLUExperts)
        same_width = mixture and new.experts.down.shape[1] == old.down.out_features  # type: ignore[union-attr,index]
        return same_width and self.suits(old, new)  # type: ignore[arg-type]

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        """Whether their widths suit."""
        raise NotImplementedError


def is_plain(block: Any, cls: type) -> bool:
    """Whether a block computes as this class does: a class that derives from it may add to it."""
    return isinstance(block, cls) and computes_alike(type(block), cls)


def width(experts: nn.Module) -> int:
    """F, hidden width of an expert."""
    return experts.down.shape[2]  # type: ignore[index, return-value]


def stacked(old: SwiGLU, n_experts: int) -> dict[str, Tensor]:
    """``gate_up`` [E,2F,D] and ``down`` [E,D,F] of E copies."""
    gate_up = torch.cat((old.gate.weight, old.up.weight))
    return {
        "experts.gate_up": gate_up.expand(n_experts, -1, -1).clone(),
        "experts.down": old.down.weight.expand(n_experts, -1, -1).clone(),
    }


@torch.no_grad()
def sum_of_weights(gate: Gating, d_model: int, seed: int) -> tuple[float, bool]:
    """What the weights of a token's experts add up to, and whether that is the same for all tokens."""
    x = torch.randn(1, PROBES, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    sums = gate(x, torch.arange(PROBES)[None] % 2).weights.sum(-1)
    mean = float(sums.mean())
    return mean, bool((sums - mean).abs().max() <= SAME * abs(mean))


@register("transplant", "copies")
class Copies(Upcycle):
    """Every expert is a copy of the dense block, and the router is drawn.

    Komatsuzaki et al. 2022 (sparse upcycling), arXiv 2212.05055. Exact if the weights of a token's experts always have
    the same sum s, by which the outputs are divided: 1 for ``topk_softmax``, ``scaling`` for a renormalised gate.
    Copies part slowly; ``drop`` makes them differ from the start.
    """

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {"name": "moe", "n_experts": 4},
            "experts": {"name": "swiglu", "d_ff": 48},
            "gating": {"name": "topk_softmax", "top_k": 2},
        },
    )

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        return new.shared is None and width(new.experts) == old.down.in_features

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, SwiGLU) and isinstance(new, MoE)
        tensors = stacked(old, len(new.experts.down))  # type: ignore[arg-type]
        total, same = sum_of_weights(new.gating, old.down.out_features, setting.seed)
        tensors["experts.down"] /= total
        note = f"weights of a token's experts add up to {total:.3g}" + ("" if same else " on average, not always")
        return Transplanted(tensors, frozenset(tensors), same, f"{note}; router drawn")


@register("transplant", "drop")
class Drop(Copies):
    """Copies of the dense block, of which a share of the hidden units is drawn again in each expert.

    Nakamura et al. 2025 (Drop-Upcycling), arXiv 2502.19261: the same units in gate, up and down, from a normal
    distribution with the mean and deviation of each matrix. Not exact; the paper's best in long training.

    Args:
        share: r, share of the hidden units that is drawn
    """

    automatic = False

    def __init__(self, share: Share = 0.5) -> None:
        self.share = share

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, SwiGLU)
        made = super().__call__(old, new, setting)
        gate_up, down = made.tensors["experts.gate_up"], made.tensors["experts.down"]
        F, generator = down.shape[2], torch.Generator().manual_seed(setting.seed)
        number = round(self.share * F)
        for expert in range(len(down)):
            units = torch.randperm(F, generator=generator)[:number]
            for rows in (gate_up[expert][:F], gate_up[expert][F:], down[expert].T):
                std, mean = torch.std_mean(rows)
                rows[units] = mean + std * torch.randn(number, rows.shape[1], generator=generator, dtype=torch.float32)
        drawn = 3 * number * down.shape[1] * len(down)
        return replace(made, exact=False, drawn=drawn, note=f"{self.share:.0%} of the hidden units drawn again")


@register("transplant", "late")
class Late(Transplant):
    """``swiglu`` → ``shortcut`` with the same network now, and another one layer later, whose output begins at zero.

    Exact where zero outputs make the late branch zero: not with experts that return their input.
    """

    handles: ClassVar[tuple[str, ...]] = ("name", "gate", "up", "down", "now", "later", "last")
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {
                "name": "shortcut",
                "now": {"name": "swiglu", "d_ff": 48},
                "later": {"name": "moe", "n_experts": 4},
            },
            "experts": {"name": "swiglu", "d_ff": 16},
            "gating": {"name": "softmax_topk", "top_k": 2},
        },
    )

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        kept = is_plain(old, SwiGLU) and is_plain(new, Shortcut) and is_plain(new.now, SwiGLU)
        return kept and shapes(new.now) == shapes(old)  # type: ignore[arg-type]

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(new, Shortcut) and isinstance(old, SwiGLU)
        copied = {f"now.{name}": tensor for name, tensor in old.state_dict().items()}
        zero = {} if new.later is None else {f"later.{name}": torch.zeros_like(t) for name, t in _outputs(new.later)}
        silent = new.later is None or _is_silent(new.later, zero, old.gate.in_features)
        note = "the late branch begins at zero" if silent else "the late branch has parts that no weight silences"
        return Transplanted({**copied, **zero}, frozenset(copied), exact=silent, note=note)


def _outputs(branch: nn.Module) -> list[tuple[str, Tensor]]:
    """The weights through which a branch adds to the residual stream, by name."""
    state = branch.state_dict()
    blocks = [(name, block) for name, block in branch.named_modules() if isinstance(block, Block)]
    names = [".".join(filter(None, (name, out))) for name, block in blocks for out in block.residual_outputs]
    return [(name, state[name]) for name in names]


@torch.no_grad()
def _is_silent(branch: nn.Module, zero: Mapping[str, Tensor], d_model: int) -> bool:
    """Whether a branch returns zeros with these weights in place of its own."""
    x = torch.randn(1, PROBES, d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    weights = {name.removeprefix("later."): tensor for name, tensor in zero.items()}
    y, _ = torch.func.functional_call(branch, weights, (x,))
    return bool((y == 0).all())


@register("transplant", "shared")
class Shared(Upcycle):
    """The dense block becomes the shared expert; routed experts are drawn, and their outputs begin at zero.

    Exact with any gate: y = dense(x) + 0. Only the routed outputs have a gradient at the first step, as the B of
    low-rank adapters.
    """

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 48}},
            "experts": {"name": "swiglu", "d_ff": 16},
            "gating": {"name": "topk_softmax", "top_k": 2},
        },
    )

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        return is_plain(new.shared, SwiGLU) and shapes(new.shared) == shapes(old)  # type: ignore[arg-type]

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        copied = {f"shared.{name}": tensor for name, tensor in old.state_dict().items()}
        zero = {"experts.down": torch.zeros_like(new.state_dict()["experts.down"])}
        return Transplanted({**copied, **zero}, frozenset(copied), exact=True, note="routed outputs begin at zero")


@register("transplant", "virtual_groups")
class VirtualGroups(Upcycle):
    """Fine-grained experts: the dense block is cut into G shards, each copied E/G times.

    He et al. 2024, arXiv 2410.07524: the G shards of one copy are a virtual group with one row of the router, so that
    they are chosen together, and top_k is a multiple of G. Then Σ w shard(x) = s/G · dense(x), with s the sum of a
    token's weights, and the outputs are multiplied by G/s. Exact if s is the same for all tokens. Expert c·G + i is
    shard i of copy c.
    """

    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "ffn": {"name": "moe", "n_experts": 8},
            "experts": {"name": "swiglu", "d_ff": 24},
            "gating": {"name": "topk_softmax", "top_k": 2},
        },
    )

    def suits(self, old: SwiGLU, new: MoE) -> bool:
        F, f = old.down.in_features, width(new.experts)
        groups, rest = divmod(F, f)
        return new.shared is None and groups > 1 and not rest and isinstance(new.gating, LinearGating)

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, SwiGLU) and isinstance(new, MoE) and isinstance(new.gating, LinearGating)
        gate, G = new.gating, old.down.in_features // width(new.experts)
        if gate.n_experts % G or gate.top_k % G:
            rule = f"and top_k must be multiples of the {G} shards that the dense block is cut into"
            remedy = f"Write n_experts={G * max(1, gate.n_experts // G)} and top_k={G * max(1, gate.top_k // G)}"
            raise BlockError("n_experts", f"{gate.n_experts}, top_k {gate.top_k}", rule, remedy)
        copies = gate.n_experts // G
        parts = [w.chunk(G, dim) for w, dim in ((old.gate.weight, 0), (old.up.weight, 0), (old.down.weight, 1))]
        gate_up = torch.stack([torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True)])
        router = gate.weight.detach()[:copies].repeat_interleave(G, 0)
        tensors: dict[str, Tensor] = {"gating.weight": router, "experts.gate_up": gate_up.repeat(copies, 1, 1)}
        with torch.no_grad():
            gate.weight.copy_(router)
        total, same = sum_of_weights(gate, old.down.out_features, setting.seed)
        tensors["experts.down"] = torch.stack(parts[2]).repeat(copies, 1, 1) * (G / total)
        note = f"{copies} copies of {G} shards" + ("" if same else "; the weights of a token's experts vary in sum")
        copied = frozenset(tensors) - {"gating.weight"}
        return Transplanted(tensors, copied, same, note, drawn=router.numel())
