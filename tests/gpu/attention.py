"""Attention at the widths of real models, where other kernels run than at odd sizes: forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from blockwright.blocks.conformance.kernel_parity import BOUNDS, greatest_error
from blockwright.blocks.kernels.attention import causal_attention_reference
from blockwright.blocks.kernels.scoring import Band, Scoring, Slopes
from blockwright.blocks.kernels.seam import capability_of, implementations
from tests.absent_gpu.cases import ATTENTIONS
from tests.gpu.answer import held, not_applicable


class Attention:
    """Job: one way to score, implementation and precision a case."""

    def __init__(self, small: bool, device: str) -> None:
        self.device, self.length, self.heads = torch.device(device), 64 if small else 1024, 4 if small else 64
        self.cases = {
            f"{name} · {by} · {str(dtype).removeprefix('torch.')}": (name, by, dtype)
            for dtype in (torch.bfloat16, torch.float32)
            for name in ATTENTIONS
            for by in implementations("attention")
            if by != "reference"
        }

    def about(self) -> dict[str, Any]:
        return {"cases": list(self.cases)}

    def turn(self, case: str) -> dict[str, Any]:
        """Whether results and gradients agree with the reference in fp32."""
        name, by, dtype = self.cases[case]
        implementation, given = implementations("attention")[by], self.given(name, dtype)
        if not implementation.runs_on(self.device.type, capability_of(self.device)):
            return not_applicable("does not run on this device")
        if implementation.takes is not None and not implementation.takes(*given):
            return not_applicable("does not take such a call, which falls through to another")
        error = greatest_error(implementation.call, causal_attention_reference, given)
        bound = BOUNDS[dtype]
        return held(error <= bound, f"differs by more than {bound:.0e} of the norm", error=error)

    def given(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Scoring]:
        """Queries, keys, values, and how they are scored."""
        case, draws = ATTENTIONS[name], torch.Generator().manual_seed(0)
        (N, K), (H, V), T = case.heads, case.widths, min(case.length, self.length)
        N, K = min(N, self.heads), max(1, K * min(N, self.heads) // N)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draws).to(dtype).to(self.device).requires_grad_()

        parts: dict[str, Any] = {
            "bias": lambda: draw(1, N, T, T).detach().float(),
            "slopes": lambda: Slopes(
                draw(N).detach().float().abs(), *torch.arange(T, device=self.device).expand(2, 1, T)
            ),
            "band": lambda: Band(draw(2, T, N, min(512, T // 2)), *torch.arange(T, device=self.device).expand(2, 1, T)),
            "segments": lambda: (torch.arange(T, device=self.device)[None] // (T // 3)).expand(2, -1).contiguous(),
            "sinks": lambda: draw(N).detach().float().requires_grad_(),
            "softcap": lambda: 20.0,
        }
        window = None if case.window is None else min(case.window, T // 2)
        made = {"bias" if part in ("slopes", "band") else part: parts[part]() for part in case.parts}
        scoring = Scoring(H**-0.5, window=window, **made)
        return draw(2, T, N, H), draw(2, T, K, H), draw(2, T, K, V), scoring
