"""Qwen3-Next: gated delta layers and gated attention, both with fused projections; routed experts beside a gated one.

In memory projections are apart, so that heads can be split over ranks. The head of multi-token prediction is left out,
as in transformers.
"""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Given, Key, Part, Unused
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.hybrid_like import DELTA, DELTA_SIZES, OURS, TYPES, delta
from blockwright.plugins.hub.llama_like import (
    ATTENTION,
    EPS,
    EXPERTS,
    FRAME,
    GIVEN_HEADS,
    LAYER,
    MIXTURE,
    PRENORM,
    QK_NORM,
    RENORMALISE,
    ROUTER,
    SILU,
    SIZES,
    TOP_K,
    expert_width,
    n_experts,
    n_heads,
    tied,
)
from blockwright.plugins.hub.names import Row, beside, block
from blockwright.plugins.hub.places import show
from blockwright.plugins.hub.rope import rope

THEIRS = LAYER + "linear_attn."
SHARED = (
    *(
        Row(f"layers.{{i}}.ffn.shared.{m}.weight", f"{LAYER}mlp.shared_expert.{m}_proj.weight")
        for m in ("gate", "up", "down")
    ),
    Row("layers.{i}.ffn.shared.token_gate.weight", LAYER + "mlp.shared_expert_gate.weight"),
)


def _fused(decoder: Decoder) -> tuple[Row, ...]:
    """Rows of fused projections: [q|k|v|z] and [β|decay] of each key head, [q|gate] of each head of full attention."""
    mixer, attention = show(decoder, "linear.attention"), show(decoder, "full.attention")
    K, V = mixer.head_dim, mixer.v_head_dim
    groups, values = mixer.query.out_features // K, mixer.shared_by * V
    widths = {"query": K, "key": K, "value": values, "output_gate.project": values}
    channels = {"query": groups * K, "key": groups * K, "value": groups * values}
    scalars = ("strength", "decay.project")
    heads = dict.fromkeys(("query", "output_gate.project"), attention.head_dim)

    def rows(sizes: dict[str, int], theirs: str, suffix: str = ".weight", **layout: Any) -> tuple[Row, ...]:
        parts = [block(tuple(sizes.values()), n, **layout) for n in range(len(sizes))]
        return tuple(Row(OURS + name + suffix, theirs, **part) for name, part in zip(sizes, parts, strict=True))

    return (
        *beside(DELTA, rows(widths, THEIRS + "in_proj_qkvz.weight", groups=groups)),
        *beside(DELTA, rows(dict.fromkeys(scalars, mixer.shared_by), THEIRS + "in_proj_ba.weight", groups=groups)),
        *beside(DELTA, rows(channels, THEIRS + "conv1d.weight", "_conv.weight", taps=True)),
        *beside("!" + DELTA, rows(heads, LAYER + "self_attn.q_proj.weight", groups=n_heads(decoder))),
    )


def _read_eps(config: Config, model: dict[str, Any]) -> None:
    model["variants"]["attention"]["linear"]["norm"]["eps"] = model["norm"]["eps"]


QWEN3_NEXT = Family(
    model_type="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "gqa", "qk_norm": {"name": "per_head"}, "output_gate": {"name": "elementwise"}},
        "ffn": {"name": "moe", "shared": {"name": "gated_swiglu"}},
        "norm": {"name": "rmsnorm1p"},
        "variants": {"attention": {"linear": {"name": "gated_delta", "norm": {"name": "rmsnorm"}}}},
    },
    settings=(
        Given(tuple(f"linear_{key}" for key in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim"))),
        Given(("norm_topk_prob",)),
        *(*SIZES, *GIVEN_HEADS, EPS, SILU, tied(), rope("half_split", fraction=0.25), *DELTA_SIZES, TYPES),
        Part(_read_eps, lambda decoder, config: None),
        *(TOP_K, RENORMALISE),
        Key("moe_intermediate_size", "experts.d_ff", expert_width),
        Key("shared_expert_intermediate_size", "ffn.shared.d_ff", "sparse.ffn.shared.gate.out_features"),
        Key("num_experts", "ffn.n_experts", n_experts),
        Fixed("attention_bias", False),
        Fixed("decoder_sparse_step", 1),
        Fixed("mlp_only_layers", []),
        Unused("intermediate_size"),
    ),
    names=(
        *(*FRAME, *PRENORM, *QK_NORM, *ROUTER, *EXPERTS, *SHARED),
        *beside("!" + DELTA, ATTENTION[1:]),
        *beside(DELTA, delta(THEIRS, "norm", "out_proj")),
        Row(DELTA, THEIRS + "A_log"),
    ),
    left_out=(r"mtp\..*",),
    sized=_fused,
)
