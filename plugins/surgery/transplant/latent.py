from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockwright.blocks.attention.grouped import GroupedAttention
from blockwright.blocks.attention.mla import MLA
from blockwright.blocks.kernels.elementwise import base_frequencies
from blockwright.blocks.norm import NoNorm, Norm
from blockwright.blocks.position.base import Position
from blockwright.blocks.position.rotary import RoPE, RoPEChosen
from blockwright.plugins.surgery.transplant.base import Setting, Transplant, Transplanted, computes_alike, differences
from blockwright.registry import BlockError, register

NEGLIGIBLE = 1e-12  # share of an energy that rounding makes of zero, in fp64
RIDGE = 1e-9  # of the mean square of an input: what the text does not show still counts a little
CHILDREN = ("qk_norm", "output_gate", "scores")


@dataclass(frozen=True)
class Turning:
    """Pairs of the keys that continue to turn.

    Args:
        heads: virtual head of each pair [R/2]
        pairs: index of its frequency [R/2]
        mixing: of each frequency, orthogonal [P,K,K]: virtual head, head of keys
        kept: share of the turning pairs' importance that they have
        complete: whether no other pair has any
    """

    heads: Tensor
    pairs: Tensor
    mixing: Tensor
    kept: float
    complete: bool


@register("transplant", "latent")
class Latent(Transplant):
    """Attention with heads of keys → latent attention (mha|gqa|mqa → mla).

    Meng et al. 2025 (TransMLA), arXiv 2502.07864; Ji et al. 2025 (MHA2MLA), arXiv 2502.14837. Of each frequency, the
    pairs of the K heads of keys are mixed by an orthogonal matrix, which commutes with the rotation (RoRoPE), so that
    few virtual heads hold most of the energy. The R/2 pairs with the largest E|k|² · Σ_n E|q_n|² become the rotated
    part that all queries share; the others stop turning. What is left of the keys, and the values, are W x with one
    joint matrix [2KH,D], whose best approximation of rank C for the inputs at hand is A Aᵀ W, with A the C leading
    eigenvectors of W E[x xᵀ] Wᵀ. Differs from the papers: pairs are chosen over all virtual heads and frequencies at
    once, which the position block ``rope_chosen`` makes possible (with plain ``rope``, the best virtual head of each of
    its frequencies); keys and values are not balanced against each other.

    Exact without positions at C = min(D, 2KH), and with them at R = KH and C = KH, if the latent has no norm
    (``kv_norm: none``). A latent norm gets the gain that keeps the mean size of the latents.

    Args:
        rank_from: ``activations``: E[x xᵀ] is measured on training text; ``weights``: it is the identity
    """

    handles: ClassVar[tuple[str, ...]] = (
        *("name", "head_dim", "n_kv_heads", "scale", "key", "value", "query"),
        *("n_heads", "nope", "rope", "v_head_dim", "latent", "kv_down", "kv_up", "kv_norm", "position"),
    )
    example: ClassVar[tuple[Mapping[str, Any], Mapping[str, Any]]] = (
        {},
        {
            "attention": {
                "name": "mla",
                "n_heads": 4,
                "kv_lora_rank": 16,
                "kv_norm": "none",
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 16,
                "v_head_dim": 8,
                "position": {"name": "rope_chosen", "of_dim": 8},
            }
        },
    )

    def __init__(self, rank_from: Literal["activations", "weights"] = "activations") -> None:
        self.rank_from = rank_from

    @property
    def reads_inputs(self) -> bool:
        return self.rank_from == "activations"

    def serves(self, old: nn.Module, new: nn.Module) -> bool:
        plain = isinstance(old, GroupedAttention) and old.window is None and isinstance(new, MLA)
        plain = plain and old.value is not None and old.readout is None
        plain = plain and old.kv_source is None and new.kv_source is None
        return plain and old.output.out_features == new.output.out_features  # type: ignore[union-attr]

    def __call__(self, old: nn.Module, new: nn.Module, setting: Setting) -> Transplanted:
        assert isinstance(old, GroupedAttention) and isinstance(new, MLA)
        _check(old, new)
        H, K = old.head_dim, old.n_kv_heads
        q, k, v = (getattr(old, n).weight.double().unflatten(0, (-1, H)) for n in ("query", "key", "value"))
        D, N = q.shape[2], len(q)
        inputs = torch.eye(D, dtype=torch.float64) if setting.inputs is None else setting.inputs
        inputs = inputs + RIDGE * inputs.diagonal().mean() * torch.eye(D, dtype=torch.float64)
        group = torch.arange(N) // (N // K)  # the head of keys of each query
        turning = _choose(old.position, new.position, q, k, group, inputs)
        q_rope, k_rope, k_rest = _turn(old.position, new, q, k, group, turning)
        up, down, kept = _low_rank(torch.cat((k_rest.flatten(0, 1), v.flatten(0, 1))), inputs, new.latent)
        key_up, value_up = up.unflatten(0, (2, K, H))
        nope = q.new_zeros(N, new.nope - H, D)
        queries = torch.cat((q, nope, q_rope), 1).flatten(0, 1) * (old.scale / new.scale)
        padding = up.new_zeros(N, new.nope - H, up.shape[1])
        tensors: dict[str, Tensor] = {
            "kv_down.weight": torch.cat((down, k_rope)),
            "kv_up.weight": torch.cat((key_up[group], padding, value_up[group]), 1).flatten(0, 1),
            "output.weight": old.output.weight,
        }
        exact = kept > 1 - NEGLIGIBLE and turning.complete and isinstance(new.kv_norm, NoNorm)
        exact = exact and _same_positions(old.position, new.position)
        assert new.kv_norm is not None
        tensors |= _gain("kv_norm", new.kv_norm, down, inputs)
        if isinstance(new.query, nn.Linear):
            tensors["query.weight"] = queries
        else:
            q_up, q_down, q_kept = _low_rank(queries, inputs, new.query[0].out_features)  # type: ignore[index]
            tensors |= {"query.0.weight": q_down, "query.2.weight": q_up}
            tensors |= _gain("query.1", new.query[1], q_down, inputs)  # type: ignore[index]
            exact = exact and q_kept > 1 - NEGLIGIBLE and isinstance(new.query[1], NoNorm)  # type: ignore[index]
        if isinstance(new.position, RoPEChosen):
            tensors["position.chosen"] = F.pad(turning.pairs, (0, len(new.position.chosen) - len(turning.pairs)))
        note = (
            f"{turning.kept:.1%} of the pairs' importance turns; rank {new.latent} holds {kept:.1%} of keys and values"
        )
        return Transplanted(tensors, frozenset({"output.weight"}), exact, note)


def _check(old: GroupedAttention, new: MLA) -> None:
    """Refuse what latent attention cannot express.

    Raises:
        BlockError
    """
    H = old.head_dim
    taken = [name for name in CHILDREN if getattr(old, name) is not None]
    if taken or old.query.bias is not None or old.output.bias is not None:
        rule = f"has no place for what the trained attention has: {', '.join(taken) or 'biases'}"
        raise BlockError("name", "mla", rule, "Keep the trained attention in these layers")
    if type(old.position).rotate is not Position.rotate and not isinstance(old.position, RoPE):
        rule = f"cannot keep the pairs of {type(old.position).__name__}, which stretches or scales them"
        raise BlockError("position", type(new.position).__name__, rule, "Begin from a model with rope")
    if new.n_heads * H != old.query.out_features:
        remedy = f"Write n_heads={old.query.out_features // H}"
        raise BlockError("n_heads", new.n_heads, "must be that of the trained queries", remedy)
    if new.v_head_dim != H:
        raise BlockError("v_head_dim", new.v_head_dim, "must be the width of the trained heads", f"Write {H}")
    if new.nope < H:
        rule = "must hold the trained heads, whose pairs may all stop turning"
        raise BlockError("qk_nope_head_dim", new.nope, rule, f"Write {H}")


# --- which pairs turn -------------------------------------------------------------------------------------------------


def dims(position: Any, width: int) -> Tensor:
    """The two dimensions of each pair that a position block rotates [2,R/2], of heads of ``width``; none without."""
    if not isinstance(position, RoPE):
        return torch.empty(2, 0, dtype=torch.int64)
    half = torch.arange(min(width, position.rotary_dim) // 2)
    return torch.stack((2 * half, 2 * half + 1) if position.interleaved else (half, half + len(half)))


def _same_positions(there: Position, here: Position) -> bool:
    """Whether nothing but the choice of pairs differs: both only turn them, or both are one block with its settings."""
    turns = [any(computes_alike(type(each), cls) for cls in (RoPE, RoPEChosen)) for each in (there, here)]
    return all(turns) or not differences(there, here)


def _choose(there: Any, here: Any, q: Tensor, k: Tensor, group: Tensor, inputs: Tensor) -> Turning:
    """Choose the pairs, by their importance in the scores.

    Args:
        there, here: the position blocks
        q, k: [N,H,D], [K,H,D]
        group: head of keys of each query
        inputs: [D,D]
    """
    places = dims(there, k.shape[1])
    keys, queries = (t[:, places].permute(2, 0, 1, 3) for t in (k, q))  # [P,K,2,D], [P,N,2,D]
    moments = torch.einsum("pkad,de,plae->pkl", keys, inputs, keys)
    energy, vectors = torch.linalg.eigh(moments)
    energy, mixing = energy.flip(1).clamp(min=0), vectors.flip(2).mT  # [P,K] and [P,K,K], largest first
    of_queries = torch.einsum("pnad,de,pnae->pn", queries, inputs, queries)
    importance = energy * torch.einsum("pvn,pn->pv", mixing[:, :, group].square(), of_queries)
    pairs, heads = _places(there, here, importance)
    total, kept = float(importance.sum()), float(importance[pairs, heads].sum())
    share = kept / total if total > 0 else 1.0
    return Turning(heads, pairs, mixing, share, share > 1 - NEGLIGIBLE)


def _places(there: Any, here: Any, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Pair and virtual head of each pair of the new rotated part [≤ R/2]."""
    P, K = importance.shape
    if not isinstance(here, RoPE) or not isinstance(there, RoPE):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    cpu = torch.device("cpu")
    trained = there.frequencies(cpu)
    if isinstance(here, RoPEChosen):
        table = base_frequencies(here.theta, here.of_dim, cpu)
        if len(table) != P or not torch.allclose(table, trained, rtol=1e-5):
            rule = f"picks from the frequencies of a head of {here.of_dim} at base {here.theta:g}"
            remedy = f"Write of_dim={2 * P} and theta={there.theta:g}, those of the trained heads"
            raise BlockError("position", "rope_chosen", rule, remedy)
        best = importance.flatten().argsort(descending=True, stable=True)[: len(here.chosen)]
        return best // K, best % K
    found: list[tuple[int, int]] = []
    for frequency in here.frequencies(cpu):
        near = int((trained - frequency).abs().argmin())
        if (trained[near] - frequency).abs() > 1e-5 * frequency:
            rule = f"turns by {float(frequency):.3g} a token, which no pair of the trained heads does"
            remedy = f"Write model.attention.position={{name: rope_chosen, of_dim: {2 * P}, theta: {there.theta:g}}}"
            raise BlockError("position", type(here).__name__, rule, remedy)
        taken = sum(pair == near for pair, _ in found)
        if taken < K:
            found.append((near, taken))
    chosen = torch.tensor(found, dtype=torch.int64)
    return chosen[:, 0], chosen[:, 1]


def _turn(there: Any, new: MLA, q: Tensor, k: Tensor, group: Tensor, turning: Turning) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N,R,D] and keys [R,D] of the rotated part, and what is left of the keys [K,H,D]."""
    q_rope, k_rope, rest = q.new_zeros(len(q), new.rope, q.shape[2]), k.new_zeros(new.rope, k.shape[2]), k.clone()
    old, here = dims(there, k.shape[1]), dims(new.position, new.rope)
    for i, (pair, head) in enumerate(zip(turning.pairs.tolist(), turning.heads.tolist(), strict=True)):
        weights = turning.mixing[pair, head]  # [K]
        virtual = torch.einsum("k,kad->ad", weights, k[:, old[:, pair]])
        k_rope[here[:, i]] = virtual
        q_rope[:, here[:, i]] = weights[group][:, None, None] * q[:, old[:, pair]]
        rest[:, old[:, pair]] -= weights[:, None, None] * virtual
    return q_rope, k_rope, rest


# --- rank -------------------------------------------------------------------------------------------------------------


def _low_rank(weight: Tensor, inputs: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best ``up @ down`` [O,C] [C,D] of a weight [O,D] for these inputs, and its share of the energy."""
    energy, vectors = torch.linalg.eigh(weight @ inputs @ weight.T)
    energy, vectors = energy.flip(0).clamp(min=0), vectors.flip(1)
    up = weight.new_zeros(len(weight), rank)
    up[:, : min(rank, len(weight))] = vectors[:, :rank]
    total = float(energy.sum())
    return up, up.T @ weight, float(energy[:rank].sum()) / total if total > 0 else 1.0


def _gain(name: str, norm: Norm, down: Tensor, inputs: Tensor) -> dict[str, Tensor]:
    """A latent norm's gain that keeps the mean size of the latents ``down x``; nothing where there is no gain."""
    if "weight" not in dict(norm.named_parameters(recurse=False)):
        return {}
    mean_square = torch.einsum("cd,de,ce->", down, inputs, down) / len(down)
    return {f"{name}.weight": mean_square.sqrt().expand(len(down)).clone()}
