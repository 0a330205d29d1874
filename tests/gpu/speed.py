"""Time, model FLOPs utilisation and peak memory of one block of each kind, compiled or not."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.shapes import SHAPES
from benchmarks.stopwatch import turns
from benchmarks.worker import peak_memory, reset_peak, return_memory
from blockwright.plugins.planner.hardware import Hardware, hardware, names
from blockwright.training.callbacks.throughput import matmul_peak
from tests.gpu.answer import passed
from tests.gpu.blocks_at_work import PARTS, work


class Speed:
    """Job: one block a case, or the largest products that the device does."""

    def __init__(self, small: bool, device: str) -> None:
        self.small, self.device = small, device
        self.product = 0.0
        length = SHAPES["smoke" if small else "lite"].sequence
        self.cases: dict[str, tuple[str, bool, int]] = {
            f"{part} · {'compiled' if compiled else 'eager'} · {batch} × {length}": (part, compiled, batch)
            for part in PARTS
            for compiled in (False, True)
            for batch in ((1,) if small else (1, 4))
        }

    def about(self) -> dict[str, Any]:
        return {"cases": list(self.cases)}

    def turn(self, case: str) -> dict[str, Any]:
        """The figures of one block."""
        part, compiled, batch = self.cases[case]
        self.product = self.product or self._product()
        return_memory()
        reset_peak(self.device)
        made = work(part, self.small, self.device, compiled, batch)
        seconds = turns({case: made.step}, self.device, budget=0.01 if self.small else 1.0, shift=0)[case]
        rate, found = made.flops / seconds, published(self.device)
        return passed(
            **{"ms": 1e3 * seconds, "tokens/s": made.tokens / seconds, "TFLOP/s": rate / 1e12},
            **{"of the largest product": rate / self.product, "MFU": None if found is None else rate / found.bf16},
            **{"peak, GB": peak_memory(self.device) / 1e9},
        )

    def _product(self) -> float:
        """FLOP/s of a large square product, measured."""
        return matmul_peak(torch.device(self.device), torch.bfloat16, 256 if self.small else None)


def published(device: str) -> Hardware | None:
    """The published rates of a device, if the planner has a file of it."""
    if device != "cuda":
        return None
    found = torch.cuda.get_device_name().upper()
    return next((hardware(name) for name in names() if name.upper() in found), None)
