"""Model sizes of the races, and our compositions for them, from which the peers' configurations are derived.

Families: ``mla_moe`` is DeepSeek's latent attention and fine-grained experts, ``dense`` a Llama and ``mixtral`` a
Mixtral with as many active parameters. V2-Lite's stretched rotary positions are left out: they cost the same as plain
ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Family = Literal["mla_moe", "dense", "mixtral"]
FAMILIES: tuple[Family, ...] = ("mla_moe", "dense", "mixtral")
TOLERANCE = 0.02  # allowed relative difference of a peer's parameters, which may lack an option


@dataclass(frozen=True)
class Shape:
    """Sizes of one race.

    Args:
        name: on the command line and in tables
        vocab_size, d_model, n_layers, n_heads: as in compositions
        latent, rope, nope, value: C and R of MLA, and the widths of a head's key without position and of its value
        n_experts, n_shared, expert_width, top_k: of the fine-grained mixture
        dense_width: d_ff of the dense family, of the same active size
        kv_heads, mixtral_width: of the Mixtral-like family, with 2 of 8 experts per token
        sequence, batch: tokens per row, and rows per training step
        optimizer: whether a step includes the optimizer's; false where its states do not fit into ordinary memory
        dtypes: precisions of the races
    """

    name: str
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    latent: int
    rope: int
    nope: int
    value: int
    n_experts: int
    n_shared: int
    expert_width: int
    top_k: int
    dense_width: int
    kv_heads: int
    mixtral_width: int
    sequence: int
    batch: int
    optimizer: bool = True
    dtypes: tuple[str, ...] = ("fp32", "bf16")

    @property
    def tokens(self) -> int:
        """Tokens per training step."""
        return self.sequence * self.batch


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("smoke", 512, 64, 2, 4, 16, 8, 16, 16, 4, 1, 32, 2, 96, 2, 48, sequence=32, batch=2),
        Shape("tiny", 4096, 256, 4, 4, 64, 32, 64, 64, 16, 2, 128, 4, 720, 2, 400, sequence=256, batch=8),
        Shape("small", 8192, 512, 8, 8, 128, 32, 64, 64, 16, 2, 256, 4, 1424, 2, 832, sequence=512, batch=8),
        # One layer of DeepSeek-V2-Lite at its real width, between a small vocabulary's embedding and head.
        Shape(
            *("lite_layer", 8192, 2048, 1, 16, 512, 64, 128, 128, 64, 2, 1408, 6, 10944, 4, 5888),
            sequence=2048,
            batch=1,
            optimizer=False,
            dtypes=("bf16",),
        ),
        # Three of them with the real vocabulary at V2-Lite's training length: for a GPU.
        Shape(
            *("lite", 102400, 2048, 3, 16, 512, 64, 128, 128, 64, 2, 1408, 6, 10944, 4, 5888),
            sequence=4096,
            batch=4,
            dtypes=("bf16",),
        ),
    )
}


def composition(shape: Shape, family: Family) -> dict[str, Any]:
    """The model node of a family at these sizes."""
    heads = {"n_heads": shape.n_heads}
    model: dict[str, Any] = {
        "vocab_size": shape.vocab_size,
        "d_model": shape.d_model,
        "n_layers": shape.n_layers,
        "max_positions": 32768,
        "init": {"std": 0.02},
        "position": {"name": "rope"},
        "norm": {"name": "rmsnorm", "eps": 1e-6},
        "residual": {"name": "prenorm"},
    }
    if family == "dense":
        return {
            **model,
            "attention": {"name": "mha", **heads},
            "ffn": {"name": "swiglu", "d_ff": shape.dense_width},
        }
    if family == "mixtral":
        return {
            **model,
            "attention": {"name": "gqa", **heads, "n_kv_heads": shape.kv_heads},
            "ffn": {"name": "moe", "n_experts": 8},
            "gating": {"name": "topk_softmax", "top_k": 2},
            "experts": {"name": "swiglu", "d_ff": shape.mixtral_width},
        }
    return {
        **model,
        "attention": {
            "name": "mla",
            **heads,
            "kv_lora_rank": shape.latent,
            "qk_rope_head_dim": shape.rope,
            "qk_nope_head_dim": shape.nope,
            "v_head_dim": shape.value,
        },
        "position": {"name": "rope", "pairing": "interleaved"},
        "ffn": {
            "name": "moe",
            "n_experts": shape.n_experts,
            "shared": {"name": "swiglu", "d_ff": shape.n_shared * shape.expert_width},
        },
        "gating": {"name": "sigmoid_bias", "top_k": shape.top_k},
        "experts": {"name": "swiglu", "d_ff": shape.expert_width},
    }
