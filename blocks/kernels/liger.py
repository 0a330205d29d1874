"""Liger's Triton kernels (Hsu et al. 2024, arXiv 2410.10989; extra ``liger``), where they are asked for by name.

Not run by this project so far, for want of a GPU: their calls are checked against the library's signatures alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockwright.blocks.kernels.cross_entropy import IGNORED
from blockwright.blocks.kernels.seam import kernel


@kernel("cross_entropy", "liger", devices=("cuda",), needs="liger_kernel", automatic=False)
def liger_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy``. It reports z_loss · Σ log² Z, so that the sum alone is 0 without z_loss."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(
        hidden,
        weight,
        targets,
        ignore_index=IGNORED,
        lse_square_scale=z_loss,
        reduction="sum",
        softcap=softcap,
        return_z_loss=True,
        accum_dtype=torch.float32,
    )
    z = found.z_loss.detach() / z_loss if z_loss else torch.zeros_like(found.loss)
    return found.loss, z


@kernel("rms_norm", "liger", devices=("cuda",), needs="liger_kernel", automatic=False)
def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm``; "gemma" is Liger's word for a norm that is fp32 throughout and rounds once, as ours does."""
    from liger_kernel.transformers.functional import liger_rms_norm as norm

    return norm(x, weight, eps, offset=0.0, casting_mode="gemma", in_place=False)


@kernel("gated_silu", "liger", devices=("cuda",), needs="liger_kernel", automatic=False)
def liger_gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """``gated_silu``."""
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)
