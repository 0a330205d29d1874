"""Parts of the small models that generation is tested with, of any vocabulary."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {"d_model": 32, "n_layers": 2, "max_positions": 64, "init": {"std": 0.2, "depth_scaled": False}}
SMALL |= {"attention": {"name": "gqa"}, "position": {"name": "rope"}, "ffn": {"name": "swiglu", "d_ff": 24}}
SMALL |= {"norm": {"name": "rmsnorm"}, "residual": {"name": "prenorm"}}
WINDOW = {"name": "sliding_window", "n_heads": 4, "n_kv_heads": 2, "window": 5}
CSA = {"name": "csa", "every": 3, "n_heads": 2, "head_dim": 8, "top_k": 2}
HYBRID: dict[str, Any] = {
    "n_layers": 3,
    "attention": {"name": "mla"},
    "variants": {"attention": {"state": {"name": "gated_delta"}, "window": WINDOW}},
    "layout": {"attention": "state window attention"},
}
