"""Tokens a second of decoding and prefill, of three layers of DeepSeek-V2-Lite."""

from __future__ import annotations

from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.decode import Decode
from benchmarks.race import Contender
from tests.gpu.answer import passed

OURS = Contender("ours", "mla_moe", "MLA + DeepSeekMoE", tuned=False)


class Decoding:
    """Job: one context and number of rows a case."""

    def __init__(self, small: bool, device: str) -> None:
        self.decode = Decode("smoke" if small else "lite", asdict(OURS), "bf16", device)
        contexts, rows = ((16,), (1, 2)) if small else ((2048, 8192, 16384), (1, 8, 64))
        self.cases = {f"decode · {c} × {b}": ("decode", c, b) for c in contexts for b in rows}
        self.cases |= {f"prefill · {c} × 1": ("prefill", c, 1) for c in contexts}

    def about(self) -> dict[str, Any]:
        return {"cases": list(self.cases)}

    def turn(self, case: str) -> dict[str, Any]:
        """The figures of one."""
        kind, context, rows = self.cases[case]
        found = self.decode.turn(kind, context, rows, 0.5)
        seconds, read = median(found["seconds"]), context if kind == "prefill" else 1
        more = (
            {"cache, MB": found["cache_bytes"] / 1e6} if kind == "decode" else {"peak, GB": found["peak_bytes"] / 1e9}
        )
        return passed(**{"ms": 1e3 * seconds, "tokens/s": rows * read / seconds}, **more)
