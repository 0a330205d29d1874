"""Growth of our cost with batch, depth and cache, and the share of routing in an MoE layer.

``python -m benchmarks.scaling``. Promised: constant seconds per token over batches, a step linear in the layers, a
decode step linear in cache bytes, each within 15 %, and routing and sorting below a tenth of a layer of 64 experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks import machine, record
from benchmarks.race import Entry, Race, spread
from benchmarks.record import Ratio, Result, Table
from benchmarks.shapes import SHAPES, Shape, composition
from benchmarks.stopwatch import seconds_of, turns

WITHIN, ROUTING = 0.15, 0.10
BATCHES, DEPTHS, CONTEXTS = (4, 8, 16), (2, 4, 8), (2048, 4096, 8192, 16384)
ROUTED = {"experts": 64, "top_k": 6, "tokens": 4096}


class Growth:
    """Job: measure ours at one size after the other."""

    def __init__(self, shape: str, dtype: str, device: str) -> None:
        self.shape, self.dtype, self.device = SHAPES[shape], dtype, device

    def about(self) -> dict[str, Any]:
        return {}

    def turn(self, kind: str, size: int, budget: float) -> dict[str, Any]:
        """``batch`` and ``layers``: seconds per training step; ``cache``: per decode step; ``routing``: its parts."""
        if kind == "routing":
            return self._routing(size, budget)
        if kind == "cache":
            return {"seconds": self._decode(size, budget)}
        sizes = {"batch": {"batch": size}, "layers": {"n_layers": size}}[kind]
        return {"seconds": self._train(replace(self.shape, **sizes), budget)}  # type: ignore[arg-type]

    def _decoder(self, shape: Shape) -> Any:
        from benchmarks.models.base import DTYPES
        from blockwright.blocks.compose import compose

        return compose(composition(shape, "mla_moe")).to(self.device, DTYPES[self.dtype])

    def _train(self, shape: Shape, budget: float) -> float:
        import torch

        decoder = self._decoder(shape)
        tokens = torch.randint(shape.vocab_size, (shape.batch, shape.sequence), device=self.device)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-4, fused=True)

        def step() -> None:
            hidden, _ = decoder.hidden(tokens)
            (decoder.nll(hidden, tokens) / tokens.numel()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return turns({"step": step}, self.device, budget=budget, shift=0)["step"]

    def _decode(self, context: int, budget: float) -> float:
        import torch

        from benchmarks.models.blockwright import Ours
        from benchmarks.race import Contender

        model = Ours(self.shape, Contender("ours", "mla_moe", "", tuned=True))
        model.decoder = self._decoder(self.shape).eval()
        token = torch.zeros(8, 1, dtype=torch.long, device=self.device)
        with torch.inference_mode():
            model.begin(8, context + 64)
            model.fill(context)
            model.step(token)
            found: list[float] = []
            while len(found) < 2 or (sum(found) < budget and len(found) < 60):
                found.append(seconds_of(lambda: model.step(token), self.device))
        return spread(found).median

    def _routing(self, n_experts: int, budget: float) -> dict[str, Any]:
        """Forward and backward of an MoE layer, of its gate, and of the sort alone."""
        import torch

        from blockwright.blocks.kernels.grouped_matmul import sort_by_expert

        shape = replace(self.shape, n_layers=1, n_experts=n_experts, top_k=min(ROUTED["top_k"], n_experts))
        ffn = self._decoder(shape).layers[0].ffn
        tokens = ROUTED["tokens"] if self.shape.name != "smoke" else 64
        x = torch.randn(1, tokens, shape.d_model, device=self.device, dtype=next(ffn.parameters()).dtype)
        x.requires_grad_()
        grad = torch.randn_like(x)
        chosen = ffn.gating(x).experts
        works = {
            "layer": lambda: ffn(x)[0].backward(grad),
            "gate": lambda: ffn.gating(x).weights.sum().backward(),
            "sort": lambda: sort_by_expert(chosen, n_experts),
        }
        return {"parts": turns(works, self.device, budget=budget, shift=0)}


def line_error(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Largest relative deviation from the best straight line."""
    mean_x, mean_y = sum(sizes) / len(sizes), sum(seconds) / len(seconds)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in zip(sizes, seconds, strict=True))
    slope /= sum((x - mean_x) ** 2 for x in sizes)
    fitted = [mean_y + slope * (x - mean_x) for x in sizes]
    return max(abs(y / f - 1) for y, f in zip(seconds, fitted, strict=True))


def flat_error(values: Sequence[float]) -> float:
    """Largest relative deviation from the mean."""
    mean = sum(values) / len(values)
    return max(abs(value / mean - 1) for value in values)


def tabulate(shape: Shape, dtype: str, found: Mapping[str, Mapping[int, Sequence[Any]]]) -> tuple[Table, list[Ratio]]:
    """The measurements, in seconds per token, layer and step, and their deviation from the promises."""
    title = f"{shape.name} · {dtype}"
    table = Table(f"Growth · {title}", ("what grows", "to", "seconds", "q1", "q3"), plotted=None)
    ratios = []
    medians: dict[str, list[float]] = {}
    for kind, sizes in found.items():
        if kind == "routing":
            continue
        for size, seconds in sizes.items():
            per = size * shape.sequence if kind == "batch" else 1
            s = spread([value / per for value in seconds])
            name = {"batch": "batch, a token", "layers": "layers, a step", "cache": "context, a decode step of 8"}[kind]
            table.rows.append([name, size, s.median, s.q1, s.q3])
            medians.setdefault(kind, []).append(s.median)
        error = flat_error(medians[kind]) if kind == "batch" else line_error(list(sizes), medians[kind])
        words = {"batch": "seconds a token, off flat in the batch", "layers": "a step, off linear in layers"}
        words["cache"] = "a decode step, off linear in cache bytes"
        ratios.append(Ratio(f"scaling · {title}: {words[kind]}", spread([error]), "less", WITHIN, checked=False))
    for size, parts in found.get("routing", {}).items():
        shares = [(p["gate"] + p["sort"]) / p["layer"] for p in parts]
        name = f"scaling · {title}: routing and sorting ÷ MoE layer of {size} experts, time"
        ratios.append(Ratio(name, spread(shares), "less", ROUTING))
    return table, ratios


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the requested measurements and save them."""
    parser = record.parser("scaling", __doc__, rounds=5, minutes=5)
    kinds = ("batch", "layers", "cache", "routing")
    record.add_names(parser, "parts", ",".join(kinds), kinds)
    record.add_names(parser, "dtypes", "fp32", ("fp32", "bf16"))
    given = record.read(parser, arguments)
    shape = SHAPES["smoke" if given.quick else "small"]
    sizes: dict[str, Sequence[int]] = {"batch": BATCHES, "layers": DEPTHS, "cache": CONTEXTS, "routing": (64,)}
    if given.quick:
        sizes = {"batch": (1, 2), "layers": (1, 2), "cache": (16, 32), "routing": (8,)}
    result = Result("scaling", machine.about(given.device, given.threads))
    for dtype in given.dtypes:
        job = Entry(f"ours {dtype}", "benchmarks.scaling:Growth", {"shape": shape.name, "dtype": dtype})
        found: dict[str, dict[int, list[Any]]] = {kind: {size: [] for size in sizes[kind]} for kind in given.parts}
        started = time.monotonic()
        with Race([job], given.device, given.threads) as race:
            for index in range(given.rounds):
                if index >= 3 and time.monotonic() - started > given.minutes * 60 / len(given.dtypes):
                    break
                for kind in given.parts:
                    for size in sizes[kind]:
                        answer = race.ask(job, {"kind": kind, "size": size, "budget": 0.0 if given.quick else 1.0})
                        if answer is None:
                            raise SystemExit(f"{kind} {size}: {job.failed}")
                        found[kind][size].append(answer.get("seconds", answer.get("parts")))
                print(f"{dtype}: round {index + 1}, {time.monotonic() - started:.0f} s", flush=True)
        table, ratios = tabulate(shape, dtype, found)
        result.tables.append(table)
        result.ratios += ratios
        result.raw[dtype] = found
        result.save(given.out)
    return result


if __name__ == "__main__":
    main()
