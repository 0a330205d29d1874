"""Formulas are read out of docstrings, without the words around them."""

import inspect

import pytest

from blockwright import registry
from blockwright.lab.drawing.equations import RELATION, equations

EXPECTED = {
    "attention/mla": (
        "[c; k_rope] = W_kv_down x",
        "[k_n; v_n] = W_kv_up,n norm(c)",
        "[q_n; q_rope,n] = W_q,n x (or, compressed, W_q_up,n norm(W_q_down x))",
        "k_n ← [k_n; rot(k_rope)]",
        "q_n ← [q_n; rot(q_rope,n)]",
        "y = W_o [softmax(q_n k_nᵀ / √(nope + rope)) v_n]_n",
    ),
    "attention/mamba2": (
        "v, k, q = silu(conv(W x))",
        "Δ = softplus(W_Δ x + b)",
        "S ← e^{−Δ exp(a)} S + k (Δ v)ᵀ",
        "y = Sᵀ q + d v",
        "exp(a) = 1 … N",
    ),
    "attention/differential": (
        "λ₀ = 0.8 − 0.6 exp(−0.3 layer), λ = exp(λ_q1·λ_k1) − exp(λ_q2·λ_k2) + λ₀",
        "y = W_o [(1 − λ₀) norm((softmax(q₁k₁ᵀ/√H) − λ softmax(q₂k₂ᵀ/√H)) v)]_n",
    ),
    "ffn/swiglu": ("y = W_down (silu(W_gate x) ⊙ W_up x)",),
    "ffn/none": (),
    "balance/communication": ("loss = α Σ_d f''_d P''_d", "f''_d = D n_d / (M T)", "P''_d = Σ_{i on d} P_i"),
    "balance/device": ("loss = α Σ_d f'_d P'_d", "f'_d = mean_{i on d} f_i", "P'_d = Σ_{i on d} P_i"),
    "balance/expert": ("loss = α Σ_i f_i P_i", "f_i = E n_i / (k T)", "P_i = mean_t (s_i,t / Σ_j s_j,t)"),
    "balance/hf_expert": ("loss = α E Σ_i F_i P_i",),
    "balance/z_loss": ("loss = α mean_t (log Σ_i exp z_i,t)²",),
    "gating/topk_softmax": ("z = W x + b", "g_i = exp(z_i) / Σ_{j chosen} exp(z_j) for the k highest z_i"),
    "gating/group_limited": ("s = softmax(W x)", "g_i = scaling · s_i for the k highest s_i in them"),
    "norm/rmsnorm": ("y = x / sqrt(mean(x²) + eps) · g",),
    "norm/rmsnorm1p": ("y = x / sqrt(mean(x²) + eps) · (1 + g)",),
    "residual/prenorm": ("x ← x + attention(norm₁(x))", "x ← x + ffn(norm₂(x))"),
    "qk_norm/full": ("q ← norm(q)", "k ← norm(k)"),
}
FORMULATED = ("attention", "ffn", "experts", "norm", "residual", "output_gate", "qk_norm")


@pytest.mark.parametrize("block", EXPECTED)
def test_formulas(block: str) -> None:
    assert equations(registry.lookup(*block.split("/")).cls) == EXPECTED[block]


@pytest.mark.parametrize("kind", FORMULATED)
def test_every_docstring_with_a_formula_gives_one(kind: str) -> None:
    for name in registry.names(kind):
        cls = registry.lookup(kind, name).cls
        second = [*(inspect.getdoc(cls) or "").partition("\nArgs:")[0].split("\n\n"), ""][1]
        if RELATION.search(second):
            assert equations(cls), name


def test_brackets_are_closed() -> None:
    for kind in registry.kinds():
        for name in registry.names(kind):
            for formula in equations(registry.lookup(kind, name).cls):
                assert all(formula.count(a) == formula.count(b) for a, b in ("()", "[]", "{}")), (name, formula)


def test_class_without_a_docstring_has_none() -> None:
    class Silent:
        pass

    assert equations(Silent) == ()
