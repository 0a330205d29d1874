from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import Tensor

from blockwright.blocks.base import Placement
from blockwright.blocks.compressor.base import Compressor, Rotate
from blockwright.blocks.compressor.pool import Pool
from blockwright.blocks.norm.base import Norm
from blockwright.registry import register


@register("compressor", "hca")
class HCA(Compressor):
    """Heavily compressed attention: one key of each 128 tokens, and every query sees all of them.

    DeepSeek-AI 2026 (DeepSeek-V4), §2.3.2. With u = W_value x, z = W_gate x and biases b of the places in a window:
    key_w = rot(norm(Σ_j softmax_j(z_j + b_j) ⊙ u_j)) over the tokens j of window w, at the position of its first one.

    Args:
        norm: norm of the means
        every: tokens of a window
    """

    conformance_settings: ClassVar[Mapping[str, Any]] = {"every": 3}

    def __init__(self, d_model: int, kv_dim: int, norm: Norm, every: Annotated[int, Ge(2)] = 128) -> None:
        super().__init__()
        self.every, self.norm = every, norm
        self.pool = Pool(d_model, kv_dim, every, overlapping=False)

    @classmethod
    def child_context(cls, child: str, known: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"dim": known["kv_dim"]}

    def pools(self) -> dict[str, Pool]:
        return {"key": self.pool}

    def finish(self, means: tuple[Tensor, ...], positions: Tensor, rotate: Rotate) -> tuple[Tensor, ...]:
        return (rotate(self.norm(means[0])[:, :, None], positions)[:, :, 0],)

    def parallel_plan(self) -> dict[str, Placement]:
        return {name: "replicate" for name, _ in self.pool.named_parameters(prefix="pool")}
