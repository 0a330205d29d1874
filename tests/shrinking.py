"""Presets made small: what they are made of stays, every size becomes one that a test can build."""

from __future__ import annotations

from typing import Any

from blockwright.blocks.compose import check, preset

# Every number of a preset that says how large something is, made small; what it is made of stays.
SIZES = (
    "vocab_size=61 image_token=60 d_model=64 max_positions=64 n_heads=4 n_kv_heads=2 n_key_heads=2 head_dim=16 "
    "rope_head_dim=8 kv_lora_rank=32 q_lora_rank=24 qk_nope_head_dim=16 qk_rope_head_dim=8 v_head_dim=16 d_ff=24 "
    "n_experts=8 n_idle=2 n_groups=4 top_groups=2 top_k=3 n_devices=4 top_devices=2 window=5 query_scale=16 "
    "rows=31 blocks=2"
)
SMALL = {name: int(size) for name, _, size in (word.partition("=") for word in SIZES.split())}


def shrunken(model: str) -> dict[str, Any]:
    """A preset with every size made small."""

    def shrunk(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: SMALL[k] if k in SMALL and isinstance(v, int) else shrunk(v) for k, v in node.items()}
        return [shrunk(v) for v in node] if isinstance(node, list) else node

    return check(shrunk(preset(model, {"vocab_size": SMALL["vocab_size"]})))
