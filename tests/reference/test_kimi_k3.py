"""Kimi K3 as its report and released code define it, written slowly: a token, a head, an expert and a source at a time.

transformers has no class for it. The preset is the same composition with other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blockwright.blocks.compose import compose, preset
from blockwright.blocks.decoder import Decoder

V, D, LAYERS, DENSE = 61, 36, 6, 1
HEADS, K, TAPS, MOST = 3, 5, 3, 5.0  # of KDA
N, NOPE, ROPE, VALUE = 2, 7, 4, 6  # of latent attention
EXPERTS, TOP, BLOCK, EPS, LATENT_EPS = 7, 3, 4, 0.01, 0.01
TOKENS = torch.randint(V, (2, 17), generator=torch.Generator().manual_seed(3))
RANKS = {"q_lora_rank": 10, "kv_lora_rank": 9, "qk_nope_head_dim": NOPE, "v_head_dim": VALUE, "qk_rope_head_dim": ROPE}
CHANGES: dict[str, Any] = {
    "vocab_size": V,
    "d_model": D,
    "n_layers": LAYERS,
    "max_positions": 64,
    "init": {"std": 0.3, "depth_scaled": False},
    "attention": {"n_heads": N, **RANKS, "q_norm": {"eps": LATENT_EPS}, "kv_norm": {"eps": LATENT_EPS}},
    "ffn": {"n_experts": EXPERTS, "shared": {"d_ff": 13}},
    "gating": {"top_k": TOP},
    "experts": {"width": 8, "up_norm": {"eps": EPS}, "experts": {"d_ff": 11}},
    "norm": {"eps": EPS},
    "residual": {"block": BLOCK, "eps": EPS},
    "variants": {
        "attention": {"linear": {"n_heads": HEADS, "head_dim": K, "taps": TAPS}},
        "ffn": {"dense": {"d_ff": 19}},
    },
    "layout": {"attention": "(linear*3 attention) linear attention", "ffn": f"dense*{DENSE} ffn*"},
}


@pytest.fixture(scope="module")
def decoder(randomise: Callable[..., None]) -> Decoder:
    made = compose(preset("kimi_k3", CHANGES))
    randomise(made, scale=0.6)
    for name, buffer in made.named_buffers():
        if name.endswith("gating.bias"):
            buffer.copy_(torch.linspace(-0.4, 0.3, EXPERTS))
    return made.eval()


class Slow:
    """The model's formulas on the weights of a decoder."""

    def __init__(self, decoder: Decoder) -> None:
        self.w = {**dict(decoder.named_parameters()), **dict(decoder.named_buffers())}

    def logits(self, tokens: Tensor) -> Tensor:
        return torch.stack([self.row(row) for row in tokens])

    def row(self, tokens: Tensor) -> Tensor:
        """Tokens [T] → [T,V]."""
        prefix: Tensor | None = self.w["embedding.weight"][tokens]
        blocks: list[Tensor] = []
        for i in range(LAYERS):
            at = f"layers.{i}."
            x = self.mixed(at + "residual.attention_query", blocks, prefix)
            if 2 * i % BLOCK == 0:
                assert prefix is not None
                blocks, prefix = [*blocks, prefix], None
            mix = self.delta if at + "attention.decay.bias" in self.w else self.latent
            y = mix(at + "attention.", self.norm(x, at + "residual.attention_norm."))
            prefix = y if prefix is None else prefix + y
            x = self.norm(self.mixed(at + "residual.ffn_query", blocks, prefix), at + "residual.ffn_norm.")
            prefix = prefix + (self.network(at + "ffn.", x) if i < DENSE else self.mixture(at + "ffn.", x))
        last = self.mixed(f"layers.{LAYERS - 1}.residual.closing_query", blocks, prefix)
        return self.norm(last, "norm.") @ self.w["head.weight"].T

    def norm(self, x: Tensor, at: str, eps: float = EPS) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.w[at + "weight"]

    def mixed(self, query: str, blocks: list[Tensor], prefix: Tensor | None) -> Tensor:
        """Attention over the sources; before the first block there is the embedding alone."""
        assert prefix is not None
        if not blocks:
            return prefix
        values = [*blocks, prefix]
        scores = [(v / (v.square().mean(-1, keepdim=True) + EPS).sqrt()) @ self.w[query] for v in values]
        weights = torch.stack(scores).softmax(0)
        return sum((w[:, None] * v for w, v in zip(weights, values, strict=True)), torch.zeros_like(prefix))

    def delta(self, at: str, x: Tensor) -> Tensor:
        """KDA with a bounded decay and a gate of full rank."""
        q, k, v = (self.convolved(at + name, x).view(-1, HEADS, K) for name in ("query", "key", "value"))
        q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
        beta = (x @ self.w[at + "strength.weight"].T).sigmoid()
        steps = x @ self.w[at + "decay.down.weight"].T @ self.w[at + "decay.up.weight"].T + self.w[at + "decay.bias"]
        rate = self.w[at + "decay.log_rate"].exp()[:, None]
        kept = (-MOST * (rate * steps.view(-1, HEADS, K)).sigmoid()).exp()
        outputs = []
        for n in range(HEADS):
            state = x.new_zeros(K, K)
            for t in range(len(x)):
                state = kept[t, n][:, None] * state
                state = state + beta[t, n] * torch.outer(k[t, n], v[t, n] - state.T @ k[t, n])
                outputs.append(state.T @ q[t, n] * K**-0.5)
        y = torch.stack(outputs).view(HEADS, len(x), K).transpose(0, 1)
        gate = (x @ self.w[at + "output_gate.project.weight"].T).sigmoid()
        return (self.norm(y, at + "norm.").flatten(1) * gate) @ self.w[at + "output.weight"].T

    def convolved(self, at: str, x: Tensor) -> Tensor:
        h, taps = x @ self.w[at + ".weight"].T, self.w[at + "_conv.weight"]
        past = F.pad(h, (0, 0, TAPS - 1, 0))
        return F.silu(sum((past[j : j + len(x)] * taps[:, j] for j in range(TAPS)), torch.zeros_like(h)))

    def latent(self, at: str, x: Tensor) -> Tensor:
        """Latent attention without positions, its outputs gated."""
        compressed = self.norm(x @ self.w[at + "query.0.weight"].T, at + "query.1.", LATENT_EPS)
        q = (compressed @ self.w[at + "query.2.weight"].T).view(-1, N, NOPE + ROPE)
        c, shared = (x @ self.w[at + "kv_down.weight"].T).split((9, ROPE), -1)
        kv = (self.norm(c, at + "kv_norm.", LATENT_EPS) @ self.w[at + "kv_up.weight"].T).view(-1, N, NOPE + VALUE)
        heads = []
        for n in range(N):
            k, v = torch.cat((kv[:, n, :NOPE], shared), -1), kv[:, n, NOPE:]
            scores = q[:, n] @ k.T / (NOPE + ROPE) ** 0.5
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            heads.append(scores.masked_fill(later, float("-inf")).softmax(-1) @ v)
        gate = (x @ self.w[at + "output_gate.project.weight"].T).sigmoid()
        return (torch.cat(heads, -1) * gate) @ self.w[at + "output.weight"].T

    def network(self, at: str, x: Tensor) -> Tensor:
        return situ(x @ self.w[at + "gate.weight"].T, x @ self.w[at + "up.weight"].T) @ self.w[at + "down.weight"].T

    def mixture(self, at: str, x: Tensor) -> Tensor:
        """Experts in a latent, whose sum is normalised before it is projected back; the router reads x itself."""
        scores = (x.float() @ self.w[at + "gating.weight"].float().T).sigmoid()  # a router is single, here too
        chosen = (scores + self.w[at + "gating.bias"]).topk(TOP).indices
        weights = scores.gather(1, chosen)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        h, rows = x @ self.w[at + "experts.down.weight"].T, []
        for t in range(len(x)):
            y = torch.zeros_like(h[t])
            for weight, e in zip(weights[t], chosen[t].tolist(), strict=True):
                gate, up = (self.w[at + "experts.experts.gate_up"][e] @ h[t]).chunk(2)
                y = y + weight * (self.w[at + "experts.experts.down"][e] @ situ(gate, up))
            rows.append(y)
        y = self.norm(torch.stack(rows), at + "experts.up_norm.") @ self.w[at + "experts.up.weight"].T
        return y + self.network(at + "shared.", x)


def situ(gate: Tensor, up: Tensor) -> Tensor:
    return 4 * (gate / 4).tanh() * gate.sigmoid() * 25 * (up / 25).tanh()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.float64, 1e-6)])  # single routers in both
def test_logits_and_gradients_are_those_of_the_formulas(decoder: Decoder, dtype: torch.dtype, bound: float) -> None:
    decoder.to(dtype)
    found, expected = decoder(TOKENS), Slow(decoder).logits(TOKENS)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=bound * expected.abs().max().item())
    weights = torch.linspace(-1, 1, found.numel(), dtype=dtype).view_as(found)
    learned = list(decoder.parameters())
    ours, theirs = (torch.autograd.grad((logits * weights).sum(), learned) for logits in (found, expected))
    for (name, _), one, other in zip(decoder.named_parameters(), ours, theirs, strict=True):
        scale = max(other.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            one, other, rtol=0, atol=30 * bound * scale, msg=lambda text, at=name: f"{at}: {text}"
        )


@torch.no_grad()
def test_steps_with_a_cache_are_those_of_the_formulas(decoder: Decoder) -> None:
    decoder.double()
    expected, caches = Slow(decoder).logits(TOKENS), decoder.new_caches(len(TOKENS), 17)
    parts = [decoder(TOKENS[:, a:b], caches=caches) for a, b in ((0, 6), (6, 7), *((t, t + 1) for t in range(7, 17)))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_preset_has_the_published_total() -> None:
    """2.78 T, 104 B of them active beside the embedding: table 1 of the report."""
    from blockwright.blocks.cost import count_parameters

    counted = count_parameters(compose(preset("kimi_k3"), device="meta"))
    assert counted.total == 2_779_483_045_984
    assert round((counted.active - counted.embedding) / 1e9) == 104
