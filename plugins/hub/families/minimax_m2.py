"""MiniMax-M2: Mixtral's files, a sigmoid gate with a bias of choice, a norm over all queries and one over all keys."""

from typing import Any

from blockwright.blocks.decoder import Decoder
from blockwright.plugins.hub.config import Config, Fixed, Key, Part, Unused, refusal
from blockwright.plugins.hub.families.mixtral import MIXTRAL, MOE
from blockwright.plugins.hub.family import Family
from blockwright.plugins.hub.llama_like import (
    EPS,
    GIVEN_HEADS,
    MIXTURE,
    QK_NORM,
    SILU,
    SIZES,
    TABLES,
    TOP_K,
    expert_width,
    n_experts,
    tied,
)
from blockwright.plugins.hub.names import Row
from blockwright.plugins.hub.places import show
from blockwright.plugins.hub.rope import rope


def _turned_part(config: Config) -> float:
    """The part of a head that turns: released files have it as a width."""
    width, head = config.take("rotary_dim", kind=int, default=None), config.take("head_dim", kind=int)
    return 1.0 if width is None or head == 0 else width / head


def _read_width(config: Config, model: dict[str, Any]) -> None:
    width, head = config.take("rotary_dim", kind=int, default=None), model["attention"]["head_dim"]
    turned = int(head * model["position"].get("rotary_fraction", 1.0))
    if width is not None and width != turned:
        rule = f"contradicts partial_rotary_factor, by which {turned} of a head's {head} dimensions turn"
        raise refusal("rotary_dim", width, rule, "Keep the one that the model was trained with")


def _write_width(decoder: Decoder, config: dict[str, Any]) -> None:
    config["rotary_dim"] = show(decoder, "first.attention.position.rotary_dim")  # read by vLLM


MINIMAX_M2 = Family(
    model_type="minimax_m2",
    architecture="MiniMaxM2ForCausalLM",
    template={
        **MIXTURE,
        "attention": {"name": "gqa", "qk_norm": {"name": "full"}},
        "gating": {"name": "sigmoid_bias"},
    },
    settings=(
        *(*SIZES, *GIVEN_HEADS, EPS, SILU, tied(), TOP_K),
        rope("half_split", theta=5e6, fraction=_turned_part),
        Part(_read_width, _write_width),
        Key("intermediate_size", "experts.d_ff", expert_width),
        Key("num_local_experts", "ffn.n_experts", n_experts, also=("num_experts",)),
        # Released files say what the class does without asking, and repeat keys of MiniMax-01 that nothing reads.
        Fixed("scoring_func", "sigmoid", written=False),
        Fixed("use_qk_norm", True, written=False),
        Fixed("qk_norm_type", "per_layer", written=False),
        Fixed("use_routing_bias", True, written=False),
        Fixed("shared_intermediate_size", 0, written=False),
        *(Unused(f"layernorm_{part}_beta") for part in ("full_attention", "linear_attention", "mlp")),
        *(Unused(key) for key in ("attn_type_list", "mlp_intermediate_size", "shared_moe_mode")),
        *(Unused(key) for key in ("use_mtp", "num_mtp_modules", "mtp_transformer_layers")),
    ),
    names=(
        *MIXTRAL.names,
        *QK_NORM,
        Row("layers.{i}.ffn.gating.bias", MOE + "e_score_correction_bias"),
        Row("layers.{i}.ffn.gating.moved", ""),
    ),
    left_out=TABLES,
)
