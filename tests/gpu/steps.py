"""Whole training steps: forward, loss, backward, AdamW, beside what the planner has forecast for them.

Ways: blocks as they are chosen, layers compiled, and with Liger's kernels, where that package is.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.util import find_spec
from statistics import median
from typing import Any

from benchmarks.race import Contender
from benchmarks.shapes import SHAPES, composition
from benchmarks.train_step import TrainStep
from benchmarks.worker import return_memory
from blockwright.blocks.compose import compose
from blockwright.plugins.planner.hardware import Hardware, coefficients
from blockwright.plugins.planner.layout import Job, Layout
from blockwright.plugins.planner.measure import measure
from blockwright.plugins.planner.memory import memory
from blockwright.plugins.planner.step import step
from tests.gpu.answer import not_applicable, passed
from tests.gpu.speed import published

FAMILY, DTYPE = "mla_moe", "bf16"
SIZES = (("tiny", 256), ("small", 512), ("lite", 2048), ("lite", 8192))
WAYS = ("chosen", "compiled", "liger")
LIGER = {"cross_entropy": "liger", "rms_norm": "liger", "gated_silu": "liger"}


class Steps:
    """Job: one shape, length and way a case."""

    def __init__(self, small: bool, device: str) -> None:
        self.device = device
        sizes = (("smoke", 32),) if small else SIZES
        self.cases = {f"{shape} · {length} · {way}": (shape, length, way) for shape, length in sizes for way in WAYS}

    def about(self) -> dict[str, Any]:
        return {"cases": list(self.cases)}

    def turn(self, case: str) -> dict[str, Any]:
        """The figures of one."""
        shape, length, way = self.cases[case]
        if way == "liger" and (self.device == "cpu" or find_spec("liger_kernel") is None):
            return not_applicable("needs a GPU and liger-kernel")
        return_memory()
        ours = Contender("ours", FAMILY, "MLA + DeepSeekMoE", tuned=False, compiled=way == "compiled")
        made = TrainStep(shape, asdict(ours), DTYPE, self.device, length)
        if way == "liger":
            made.model.module.choose_kernels(LIGER)
        found = made.turn()
        seconds, tokens = median(found["seconds"][1:] or found["seconds"]), made.shape.tokens
        figures = {"ms": 1e3 * seconds, "tokens/s": tokens / seconds, "peak, GB": found["peak_bytes"] / 1e9}
        return passed(**figures, **forecast(shape, length, published(self.device), seconds))


def forecast(shape: str, length: int, hardware: Hardware | None, seconds: float) -> dict[str, float | None]:
    """What the planner says of a step on a device, and its utilisation; nothing of a device that it has no file of."""
    if hardware is None:
        return dict.fromkeys(("MFU", "forecast, ms", "forecast ÷ measured", "forecast, GB"))
    sized = replace(SHAPES[shape], sequence=length)
    measured = measure(compose(composition(sized, FAMILY), device="meta"))
    job, layout = Job(1, sized.batch, length), Layout(micro_batch=sized.batch)
    planned = step(measured, job, layout, hardware, coefficients())
    held = sum(memory(measured, job, layout).values())
    return {
        "MFU": planned.flops_per_second * planned.seconds / seconds / hardware.bf16,
        "forecast, ms": 1e3 * planned.seconds,
        "forecast ÷ measured": planned.seconds / seconds,
        "forecast, GB": held / 1e9,
    }
