"""Random damage to a valid model: it composes, or it is refused, and nothing else happens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from blockwright.blocks.compose import compose
from blockwright.registry import ConfigError

VALID: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 16,
    "n_layers": 2,
    "max_positions": 8,
    "tie_embeddings": False,
    "init": {"std": 0.02, "depth_scaled": False},
    "attention": {"name": "gqa", "n_heads": 4, "n_kv_heads": 2, "position": {"theta": 100.0}},
    "position": {"name": "rope"},
    "ffn": {"name": "moe", "n_experts": 4, "shared": {"name": "swiglu", "d_ff": 8}},
    "gating": {"name": "softmax_topk", "top_k": 2, "balance": {"name": "expert"}},
    "experts": {"name": "swiglu", "d_ff": 8},
    "norm": {"name": "rmsnorm", "eps": 1e-6},
    "residual": {"name": "prenorm", "ffn_norm": {"eps": 1e-5}},
    "variants": {"ffn": {"dense": {"name": "gelu"}}},
    "layout": {"ffn": "dense*1 ffn*"},
    "overrides": [{"layers": 1, "attention": {"name": "mla", "n_heads": 4}}],
}

WORDS = ["name", "theta", "d_ff", "n_heads", "top_k", "position", "norm", "layers", "_target_", "dense", "x"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([10**6, 10**12, 2**63, 10**40, -(10**12)])
    | st.floats()
    | st.sampled_from(
        ["gqa", "mla", "moe", "swiglu", "rope", "alibi", "learned", "yarn", "layernorm", "sandwich", "group_limited",
         "sigmoid_bias", "none", "dense*1 ffn*", "ffn", "0..1", "-1", "???", "${d_model}", "${nowhere}", "",
         "half_split"]
    )
    | st.text(max_size=4)
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=5,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [p for key, inner in items for p in places(inner, (*path, key))]


@st.composite
def mutants(draw: st.DrawFn) -> dict[str, Any]:
    model = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(model)))
        at: Any = model
        for key in path[:-1]:
            at = at[key]
        change = draw(st.sampled_from(["replace", "drop", "add", "rename"]))
        if change == "replace":
            at[path[-1]] = draw(VALUES)
        elif change == "drop":
            del at[path[-1]]
        elif isinstance(at, dict):
            key = draw(st.sampled_from(WORDS) | st.text(max_size=3) | st.integers())
            at[key] = draw(VALUES) if change == "add" else at.pop(path[-1])
        if not model:
            break
    return model


def test_unmutated_model_is_valid() -> None:
    compose(VALID, device="meta")


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@example({**VALID, "vocab_size": 10**40})
@example({**VALID, "d_model": 2**62})
@example({**VALID, "n_layers": 10**40})
@example({**VALID, "gating": {"name": "group_limited", "n_groups": 2**63}})
@given(mutants())
def test_any_mutant_composes_or_is_refused_and_nothing_else(model: dict[str, Any]) -> None:
    try:
        decoder = compose(model, device="meta")
    except ConfigError as error:
        assert error.path and error.rule and error.remedy
        assert str(error) and error.render()
    else:
        assert all(p.is_meta for p in decoder.parameters())
        compose(decoder.config, device="meta")
        if decoder.config["vocab_size"] < 10**6 > decoder.config["d_model"]:
            logits = decoder(torch.zeros(1, 5, dtype=torch.long, device="meta"))  # what composes runs
            assert logits.shape == (1, 5, decoder.config["vocab_size"])
